"""Files that travel with the package, and files that appear whole or not at all."""

import errno
import json
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pydantic import TypeAdapter, ValidationError

from kdguard.errors import InputError

_PACKAGE = Path(__file__).parent
# How safetensors and torch say that the disk or a quota is full.
_FULL = "os error 28", "os error 122", "PytorchStreamWriter", "inline_container"


def shipped(name: str) -> Path:
    """The folder `presets` or `examples`: inside the package in a wheel, beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk. Windows keeps no folder open to do so."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_foreign(folder: Path) -> None:
    """Raise InputError for a folder with anything in it, or behind its links, that is not this user's own alone.

    Another user's is refused for root too, and so is what anybody may write. The files of an optimiser and of random
    numbers are pickles. transformers reads them with `weights_only=True`; that they are the user's own is what stands
    behind it.
    """
    if not hasattr(os, "getuid"):  # Windows
        return
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link leads back
            folders.clear()
            continue
        seen.add(real)
        for path in (Path(place), *(Path(place, name) for name in [*folders, *files])):
            of = [path.lstat().st_uid, path.stat().st_uid] if path.exists() else [path.lstat().st_uid]
            if strangers := [uid for uid in of if uid != os.getuid()]:
                raise InputError(
                    f"{path}: this is of another user (uid {strangers[0]}), and only your own runs are gone on with",
                    f"tune again; or, if you made it under another name: chown -R {os.getuid()} {folder}",
                )
            if path.exists() and anybody_writes(path):
                raise InputError(
                    f"{path}: anybody may write this, and only what you alone can have written is gone on with",
                    f"tune again; or, if nobody else has: chmod -R o-w {shlex.quote(str(path))}",
                )


def anybody_writes(path: Path) -> bool:
    """Whether all users may write a file or folder, on a disk that keeps such permissions: WSL's /mnt/c does not."""
    mode = path.stat().st_mode
    if not mode & stat.S_IWOTH or not (stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and not mode & stat.S_ISVTX)):
        return False
    try:
        with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent) as nobody_elses:
            return not os.fstat(nobody_elses.fileno()).st_mode & stat.S_IWOTH
    except OSError:
        return True


@contextmanager
def telling_full_disk(path: Path) -> Iterator[None]:
    """Raise OSError, as the system does, whatever the library raises that meets a full disk while it writes `path`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not any(said in str(error) for said in _FULL):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """Write beside, sync, rename: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder: yields one beside it to fill, which then takes its place. Subfolders are filled too."""
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        with telling_full_disk(folder):
            yield beside
        put_in_place(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def put_in_place(beside: Path, folder: Path) -> None:
    """Sync a folder that is filled and rename it to `folder`; one that is there gives way."""
    for path in (*beside.rglob("*"), beside):
        sync(path)
    before = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    beside.rename(folder)
    sync(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def read_json(path: Path, kind: TypeAdapter[Any], what: str, hint: str) -> Any:
    """What a JSON file holds, as it is, once it is of `kind`. Raises InputError that names what is wrong."""
    try:
        found = json.loads(path.read_bytes())
        kind.validate_python(found)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: found no {what} ({reason(error)})", hint) from None
    return found


def reason(error: Exception) -> str:
    """Why something could not be read, in one short line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return ": ".join(filter(None, [".".join(map(str, first["loc"]))[:100], first["msg"][:200]]))
    return "nested too deep" if isinstance(error, RecursionError) else str(error).split("\n")[0][:200]


def write_whole(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    with writing(path) as file:
        file.write(text)


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write rows as JSON, a line each, whole or not at all."""
    with writing(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

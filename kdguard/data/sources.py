"""Files, folders and hub datasets -> rows, in a stream, each with where it stands: `file:line`."""

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kdguard.errors import InputError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of bytes that are no UTF-8
_CHUNK = 2**20  # characters of a JSON list that are read at once
_LONGEST_ROW = 2**26  # characters of one row of a JSON list
_OFTEN = 1000  # rows between two calls of `progress`

STRICT = "surrogateescape"  # bytes that are no UTF-8 make their row an error
WINDOWS = "windows-1252"  # they are read as Windows-1252, which most of them are


def _as_windows(error: UnicodeError) -> tuple[str, int]:
    """For the codec: the bytes that it could not decode, as Windows-1252."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("cp1252", errors="replace"), error.end


codecs.register_error(WINDOWS, _as_windows)

Found = tuple[str, Any]  # `file:line` and the row, or an InputError in its place when only that row is broken


@dataclass(frozen=True)
class Hub:
    """A dataset of the hub, by its id."""

    name: str

    def missing(self, error: Exception) -> InputError:
        """What to say when it cannot be read."""
        reason = str(error).strip().split("\n")[0]
        return InputError(
            f"{self.name}: no such file, and no dataset of the hub that could be read ({reason})",
            "check the name and the network; private ones need `hf auth login`; a downloaded file works too",
        )


def find_sources(names: Sequence[str]) -> list[Path | Hub]:
    """The files that are meant: themselves, those of a folder and its subfolders in order, or a hub dataset.

    Raises InputError for what is not there, or holds no rows that could be read.
    """
    found: list[Path | Hub] = []
    for name in names:
        path = Path(name)
        if os.path.isdir(name):  # unlike path.is_dir(), no error for a name that no file can have
            inside = sorted(
                file
                for file in path.rglob("*")
                if file.is_file()
                and file.suffix.lower() in SUFFIXES
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            if not inside:
                raise InputError(f"{name}: found no file of rows in this folder", f"one of {', '.join(SUFFIXES)}")
            found += inside
        elif os.path.isfile(name):
            if path.suffix.lower() not in SUFFIXES:
                raise InputError(
                    f"{path}: found {path.suffix or 'no suffix'}, expected {', '.join(SUFFIXES)}",
                    "rename it, or save it as one JSON object a line in a .jsonl file",
                )
            found.append(path)
        elif _HUB_ID.fullmatch(name) and path.suffix.lower() not in SUFFIXES and not os.path.exists(path.parent):
            found.append(Hub(name))
        else:
            raise InputError(
                f"{name}: no such file", f"a file ({', '.join(SUFFIXES)}), a folder, or a hub dataset's id"
            )
    return list({source.resolve() if isinstance(source, Path) else source: source for source in found}.values())


def stamp(source: Path | Hub) -> tuple[int, int]:
    """A file's size in bytes and when it was last changed; of the hub's neither is known."""
    return (source.stat().st_size, source.stat().st_mtime_ns) if isinstance(source, Path) else (0, 0)


def refuse_changed(sources: Sequence[Path | Hub], before: Sequence[tuple[int, int]]) -> None:
    """Raise InputError for a file whose stamp is no longer what it was before."""
    for source, was in zip(sources, before, strict=True):
        if stamp(source) != was:
            raise InputError(f"{source}: this file changed while it was read", "run it again")


def read_sources(
    sources: Sequence[Path | Hub],
    progress: Callable[[int, int], None] = lambda done, total: None,
    errors: str = STRICT,
) -> Iterator[Found]:
    """Every row of every source, one at a time. `progress` is told of the bytes read so far, and of all.

    errors: what becomes of bytes that are no UTF-8, STRICT or WINDOWS. Raises InputError where nothing after it can be
    read.
    """
    sizes = [stamp(source)[0] for source in sources]
    before, total = 0, sum(sizes)
    for source, size in zip(sources, sizes, strict=True):
        if isinstance(source, Hub):
            yield from _hub_rows(source)
            continue
        with _open(source) as raw:
            rows = 0
            for line, row in _readers(source)(source, raw, errors):
                yield f"{source}:{line}", row
                rows += 1
                if rows % _OFTEN == 0:
                    progress(before + min(raw.tell(), size), total)
        if not rows:
            raise InputError(f"{source}: found no rows", "add at least one row, or leave the file out")
        before += size
    progress(total, total)


def read_rows(path: Path) -> Iterator[Found]:
    """The rows of one file. Raises InputError for the first that cannot be read."""
    for where, row in read_sources([path]):
        if isinstance(row, InputError):
            raise row
        yield where, row


def read_text(path: Path) -> str:
    """A text file as a whole. Raises InputError for one that is no UTF-8 (or, by its mark, UTF-16) text."""
    with _open(path) as raw:
        try:
            text = _text(path, raw).read()
        except UnicodeError:
            raise _broken_utf16(path) from None
    if bad := _NOT_UTF8.search(text):
        raise _not_utf8(f"{path}:{text.count(chr(10), 0, bad.start()) + 1}")
    return text


def _readers(path: Path) -> Callable[[Path, BinaryIO, str], Iterator[tuple[int, Any]]]:
    return {".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows}.get(path.suffix.lower(), _json_rows)


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror})", f"ls -l {path}") from None


def _text(path: Path, raw: BinaryIO, errors: str = STRICT, newline: str = "\n") -> io.TextIOWrapper:
    start = raw.read(2**10)
    raw.seek(0)
    if not start.strip():
        raise InputError(f"{path}: the file is empty", "add at least one row, or leave the file out")
    utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if b"\0" in start and not utf16:
        line = start.count(b"\n", 0, start.index(b"\0")) + 1
        raise InputError(f"{path}:{line}: found a binary file", "save the rows as UTF-8 text, one JSON object a line")
    encoding = "utf-16" if utf16 else "utf-8-sig"
    return io.TextIOWrapper(raw, encoding, errors=errors, newline=newline)


def _not_utf8(where: str) -> InputError:
    return InputError(
        f"{where}: found bytes that are not UTF-8 text",
        "save the file as UTF-8 text; `kdguard data check FILE --fix OUT.jsonl` does it for Windows-1252",
    )


def _broken_utf16(where: object) -> InputError:
    return InputError(f"{where}: found broken UTF-16 text", "save the file as UTF-8 text")


def _json_rows(path: Path, raw: BinaryIO, errors: str) -> Iterator[tuple[int, Any]]:
    """A list of rows, or a row a line, whichever the file begins with."""
    text = _text(path, raw, errors)
    try:
        while (first := text.read(1)).isspace():
            pass
        text.seek(0)
        yield from _list_rows(path, text) if first == "[" else _line_rows(path, text)
    except UnicodeError:
        raise _broken_utf16(path) from None


def _broken(error: Exception, text: str) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON in {_near(text, error.pos)}"
    return "JSON nested too deep" if isinstance(error, RecursionError) else "a number too long"


def _near(text: str, at: int) -> str:
    return repr(text[max(at - 30, 0) : at + 30].strip())


def _line_rows(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[int, Any]]:
    decode = json.JSONDecoder(strict=False).decode  # a tab within a text is found by `data check`, and no error
    for number, line in enumerate(text, 1):
        if not line.isascii() and _NOT_UTF8.search(line):
            yield number, _not_utf8(f"{path}:{number}")
            continue
        try:
            yield number, decode(line)
        except (ValueError, RecursionError) as error:
            if not line.strip():
                continue
            yield (
                number,
                InputError(
                    f"{path}:{number}: found {_broken(error, line)}, expected one object a line",
                    "put the whole object on that line" if line.strip() == "{" else "mend or delete that line",
                ),
            )


def _list_rows(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder(strict=False)
    buffer, at, ended = "", 0, False
    line, counted = 1, 0  # the line of the place in the buffer up to which lines are counted

    def line_of(place: int) -> int:
        """Of a place at or after all that were asked for."""
        nonlocal line, counted
        line += buffer.count("\n", counted, place)
        counted = place
        return line

    def fail(found: str, at: int) -> InputError:
        return InputError(f"{path}:{line_of(at)}: found {found}, expected a list of rows", "[{...}, {...}]")

    def more() -> None:
        """Read on, and forget what is done with."""
        nonlocal buffer, at, counted, ended
        line_of(at)
        chunk = text.read(max(_CHUNK, len(buffer) - at))
        buffer, at, counted, ended = buffer[at:] + chunk, 0, 0, not chunk
        if bad := _NOT_UTF8.search(buffer):
            raise _not_utf8(f"{path}:{line_of(bad.start())}")

    def peek() -> str:
        """The next character that is no space, or nothing at the end of the file."""
        nonlocal at
        while True:
            while at < len(buffer) and buffer[at].isspace():
                at += 1
            if at < len(buffer) or ended:
                return buffer[at : at + 1]
            more()

    peek()
    at += 1  # the bracket
    while (sign := peek()) and sign != "]":
        try:
            row, end = decoder.raw_decode(buffer, at)
            whole = ended or end < len(buffer)  # a number may go on in the next chunk
        except (ValueError, RecursionError) as error:
            if ended or len(buffer) - at > _LONGEST_ROW or isinstance(error, RecursionError):
                raise fail(_broken(error, buffer), getattr(error, "pos", at)) from None
            whole = False
        if not whole:
            more()
            continue
        yield line_of(at), row
        at = end
        if (sign := peek()) == ",":
            at += 1
            if peek() == "]":
                raise fail("a comma after the last row", at)
        elif sign and sign != "]":
            raise fail(f"broken JSON in {_near(buffer, at)}", at)
    if not sign:
        raise fail("the end of the file inside the list", len(buffer) - 1)
    at += 1
    if peek():
        raise fail("text after the list", at)


def _csv_rows(path: Path, raw: BinaryIO, errors: str) -> Iterator[tuple[int, Any]]:
    text = _text(path, raw, errors, newline="")
    csv.field_size_limit(_LONGEST_ROW)
    line = 1
    try:
        header = text.readline()
        text.seek(0)
        delimiter = next((sign for sign in ("\t", ",", ";") if sign in header), ",")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        columns = [name.strip() for name in next(reader, [])]
        if twice := next((name for name in columns if name and columns.count(name) > 1), None):
            raise InputError(f"{path}:1: found the column {twice!r} twice", "give each column its own name")
        if _NOT_UTF8.search("".join(columns)):
            raise _not_utf8(f"{path}:1")
        line = reader.line_num + 1
        for values in reader:
            if len(values) != len(columns):
                if values:  # a blank line has none
                    yield (
                        line,
                        InputError(
                            f"{path}:{line}: found a row of {len(values)} columns, expected the {len(columns)} of the "
                            "header",
                            f'put "quotes" around values with {delimiter!r} or line breaks in them',
                        ),
                    )
            elif any(not value.isascii() and _NOT_UTF8.search(value) for value in values):
                yield line, _not_utf8(f"{path}:{line}")
            else:
                yield line, dict(zip(columns, values, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{line}: found broken CSV ({error})", 'put "quotes" around values') from None
    except UnicodeError:
        raise _broken_utf16(f"{path}:{line}") from None


def _parquet_rows(path: Path, raw: BinaryIO, errors: str) -> Iterator[tuple[int, Any]]:
    """Parquet has no lines: its rows are counted."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(raw, buffer_size=_CHUNK, pre_buffer=False)
        names = file.schema_arrow.names
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"{path}: found the column {twice!r} twice", "rename one of them")
        batches = file.iter_batches(batch_size=_OFTEN)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (pa.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: found a broken Parquet file ({reason})", "save it again, or as JSONL") from None


def _hub_rows(source: Hub) -> Iterator[Found]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            f"{source.name}: no such file, and for a dataset of the hub the `datasets` library is missing",
            "pip install datasets",
        ) from None
    try:
        number = 0
        for number, row in enumerate(load_dataset(source.name, split="train", streaming=True), 1):
            yield f"{source.name}:{number}", row
        if not number:
            raise ValueError("found no rows")
    except Exception as error:  # whatever the hub's libraries raise in this version
        raise source.missing(error) from None

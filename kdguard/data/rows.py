"""All rows of a run, tokenised in a stream: in memory, or where they are many in a file that the next run finds."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import transformers
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerBase

from kdguard import __version__
from kdguard.data import IGNORE
from kdguard.data.formats import Example, read_examples
from kdguard.data.sources import Hub, find_sources, refuse_changed, stamp
from kdguard.data.tokens import Renderer, Row
from kdguard.errors import InputError

CACHE = Path(HF_HOME) / "kdguard"  # whoever has moved the models to a larger disk has moved this
LARGE = 2**24  # bytes of data from which on the tokens are kept in a file
KEPT_FOR = 30 * 24 * 3600  # seconds since a file was last used
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 2**22
_SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "target": pa.list_(pa.bool_()),
        "length": pa.int32(),
        "targets": pa.int32(),
        "cut": pa.int32(),
        "asks": pa.bool_(),
        "format": pa.string(),
        "example": pa.string(),
    }
)


class Rows(Sequence[Row]):
    """Rows by their place, and the example that each is of. What lies in a file is read from there when it is needed.

    places: of each row among all. lengths, targets, cut: tokens, target tokens and tokens left out of each row,
    (rows,). asks: whether it has a question, which plain text has not, (rows,). formats: those found.
    """

    def __init__(self, table: pa.Table, places: Sequence[int] | None = None) -> None:
        self.table = table
        self.places = range(len(table)) if places is None else places
        self.lengths, self.targets, self.cut = (table[name].to_numpy() for name in ("length", "targets", "cut"))
        self.asks = table["asks"].to_numpy()
        self.formats: list[str] = pc.unique(table["format"]).to_pylist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, place: int) -> Row:
        ids, target = (self.table[name][place].as_py() for name in ("ids", "target"))
        labels = [token if chosen else IGNORE for token, chosen in zip(ids, target, strict=True)]
        return Row(ids, labels, int(self.cut[place]))

    def take(self, places: Sequence[int]) -> "Rows":
        """Some of the rows."""
        return Rows(self.table.take(pa.array(places, pa.int64())), places)

    def example(self, place: int) -> Example:
        """The example of a row; of a plain text without the text."""
        return _example(self.table["example"][place].as_py())

    def examples(self) -> Iterator[Example]:
        """The examples of all rows, in order."""
        for chunk in self.table["example"].chunks:
            yield from map(_example, chunk.to_pylist())


def tokenise(
    names: Sequence[str],
    renderer: Renderer,
    max_length: int,
    *,
    columns: Mapping[str, str] | None = None,
    last_turn: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Rows:
    """The rows of files, folders or hub datasets. `progress` is told of the bytes read so far, and of all.

    The tokens of large data are kept under CACHE, by the content of the data and all that the tokens depend on.
    Raises InputError for the first row that cannot be used.
    """
    sources = find_sources(names)
    read = read_examples(names, columns, progress)
    batches = _batches(read, renderer, max_length, last_turn)
    before = [stamp(source) for source in sources]
    if all(isinstance(source, Path) for source in sources) and sum(size for size, _ in before) < LARGE:
        return Rows(pa.Table.from_batches(batches, _SCHEMA))
    settings = [__version__, columns, max_length, last_turn, _fingerprint(renderer.tokenizer)]
    path = CACHE / f"{_digest(sources, settings)}.arrow"
    if kept := _read(path):
        os.utime(path)
        return kept
    _write(path, _unless_changed(batches, sources, before))
    return Rows(_open(path))


def _open(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _read(path: Path) -> Rows | None:
    """The rows of a file, if it is there and whole."""
    try:
        return Rows(_open(path))
    except (OSError, pa.ArrowException):
        return None


def _batches(
    found: Iterator[tuple[str, Example] | InputError], renderer: Renderer, max_length: int, last_turn: bool
) -> Iterator[pa.RecordBatch]:
    formats: dict[str, str] = {}  # by where a row stands
    examples: list[Example] = []
    characters = 0

    def batch() -> pa.RecordBatch:
        rows = []
        for example, row in renderer.rows(examples, max_length, last_turn=last_turn):
            if isinstance(row, InputError):
                raise row
            rows.append(
                {
                    "ids": row.ids,
                    "target": [label != IGNORE for label in row.labels],
                    "length": len(row.ids),
                    "targets": row.targets,
                    "cut": row.cut,
                    "asks": bool(example.messages) and len(example.messages) - 1 not in example.muted,
                    "format": formats[example.where],
                    "example": json.dumps([example.messages, example.answers, example.where, example.muted]),
                }
            )
        return pa.RecordBatch.from_pylist(rows, _SCHEMA)

    for each in found:
        if isinstance(each, InputError):
            raise each
        formats[each[1].where] = each[0]
        examples.append(each[1])
        characters += len(each[1].text) + sum(len(turn["content"]) for turn in each[1].messages)
        if len(examples) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield batch()
            formats, examples, characters = {}, [], 0
    if examples:
        yield batch()


def _example(text: str) -> Example:
    messages, answers, where, muted = json.loads(text)
    return Example(tuple(messages), tuple(answers), where, tuple(muted))


def _unless_changed(
    batches: Iterator[pa.RecordBatch], sources: Sequence[Path | Hub], before: Sequence[tuple[int, int]]
) -> Iterator[pa.RecordBatch]:
    """The batches, if the sources are then what they were: their tokens will be found by what they held."""
    yield from batches
    refuse_changed(sources, before)


def _write(path: Path, batches: Iterator[pa.RecordBatch]) -> None:
    """Write beside, rename: whole or not at all. Files that nobody has used for long make room."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path.parent}: the tokens of large data are kept here, and that cannot be done ({error.strerror})",
            "HF_HOME=FOLDER kdguard ..., a folder with room",
        ) from None
    for old in path.parent.iterdir():
        if time.time() - old.stat().st_mtime > KEPT_FOR:
            old.unlink(missing_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            with pa.ipc.new_file(file, _SCHEMA) as writer:
                for batch in batches:
                    writer.write(batch)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _digest(sources: Sequence[Path | Hub], settings: Sequence[object]) -> str:
    """Of the content of the data, under its names, and the settings."""
    whole = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for source in sources:
        if isinstance(source, Hub):
            whole.update(f"{source.name} {_commit(source)}".encode())
        else:
            with open(source, "rb") as file:
                whole.update(str(source).encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _commit(source: Hub) -> str:
    try:
        return str(HfApi().dataset_info(source.name, timeout=10).sha)
    except Exception as error:  # whatever the hub's HTTP library raises in this version
        raise source.missing(error) from None


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides what a tokenizer makes of a conversation."""
    whole = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    today = time.strftime("%Y-%m-%d") if "strftime_now" in tokenizer.chat_template else ""  # some write the date
    parts = [transformers.__version__, type(tokenizer).__name__, today, whole, tokenizer.chat_template]
    parts += [{name: str(token) for name, token in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

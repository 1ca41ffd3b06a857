"""What is wrong with rows, found before a model sees them: in a stream, with some hundred bytes of memory a row.

The file is read twice: once for the figures, once more for the words of the rows that were found. No torch.
"""

import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdguard.data.formats import Example, read_examples
from kdguard.data.near import NearRepeats
from kdguard.data.sources import STRICT, find_sources, refuse_changed, stamp
from kdguard.data.trouble import troubles
from kdguard.errors import InputError
from kdguard.probes.score import is_correct, normalise

UNUSABLE, REPEATED, NEARLY, CONTRADICTED = "unusable", "repeated", "nearly repeated", "contradicted"
COMPARED = 20  # answers to one question that a further one is compared with
KEPT = 1000  # findings of a kind that are kept in words; all are counted
_LONG = 200  # characters from which on texts are compared letter by letter, which is faster
_SIGNS = re.compile(r"""[^\w\s.,;:!?'"’‘“”()-]""")

Said = tuple[str | bytes, str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Finding:
    """Something about a row: `where` it stands, as `file:line`, and what was found there."""

    where: str
    what: str


@dataclass
class Checked:
    """What was found in the data.

    rows: those that can be used. characters: of each of those. counts: rows by kind of finding; of each kind `findings`
    holds the first KEPT. unusable: the first row that cannot be used, as an error. ended: what is so broken that
    nothing after it could be read.
    """

    formats: list[str] = field(default_factory=list)
    characters: NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    counts: Counter[str] = field(default_factory=Counter)
    findings: defaultdict[str, list[Finding]] = field(default_factory=lambda: defaultdict(list))
    unusable: InputError | None = None
    ended: InputError | None = None

    @property
    def rows(self) -> int:
        return len(self.characters)

    def add(self, kind: str, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.counts[kind] += 1
            if self.counts[kind] <= KEPT:
                self.findings[kind].append(finding)

    def refuse(self, error: InputError) -> None:
        """Count a row that cannot be used."""
        self.unusable = self.unusable or error
        where, _, what = error.message.partition(": ")
        self.add(UNUSABLE, [Finding(where, what)])

    def figures(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "rows": self.rows,
            "formats": self.formats,
            "characters": lengths(self.characters),
            "findings": {
                kind: {"rows": n, "first": [vars(finding) for finding in self.findings[kind]]}
                for kind, n in self.counts.items()
            },
        }


def said(text: str) -> Said:
    """Equal for texts that say the same: normalised, with the signs apart, without which 5 + 3 would be 5 × 3."""
    if len(text) > _LONG:
        return text.casefold().encode(errors="replace").translate(None, b" \t\r\n"), ""
    return normalise(text) or text.strip(), "".join(_SIGNS.findall(unicodedata.normalize("NFKC", text)))


def asked_by(example: Example) -> tuple[tuple[str, Said], ...]:
    """Equal for rows that ask the same: who says what before the last answer. A plain text asks for itself."""
    if not example.messages:
        return (("text", said(example.text)),)
    return tuple((turn["role"], said(turn["content"])) for turn in example.messages[:-1])


def taught_by(example: Example) -> Said:
    """Equal for rows that answer the same."""
    return said(example.answers[0]) if example.answers else ("", "")


def exactly(example: Example) -> tuple[object, ...]:
    """Equal for rows of which one can go: letter by letter, but for how accents are encoded and spaces at an edge."""
    turns = tuple((turn["role"], _letters(turn["content"])) for turn in example.messages)
    return turns, tuple(map(_letters, example.answers)), example.muted, _letters(example.text)


def _letters(text: str) -> str:
    return text.strip() if text.isascii() else unicodedata.normalize("NFC", text).strip()


def shares_an_answer(answers: Sequence[str], others: Sequence[str]) -> bool:
    """Whether a form of one side is a form of the other, or would be scored right there."""
    return (
        not {said(form) for form in answers}.isdisjoint(said(form) for form in others)
        or any(is_correct(form, others) for form in answers if len(form) <= _LONG)
        or any(is_correct(form, answers) for form in others if len(form) <= _LONG)
    )


def lengths(each: NDArray[Any]) -> dict[str, int]:
    """Percentiles of the rows' lengths."""
    if not len(each):
        return {}
    found = np.percentile(each, (50, 90, 99, 100), method="lower").astype(int).tolist()
    return dict(zip(("median", "p90", "p99", "longest"), found, strict=True))


def in_short(example: Example) -> str:
    """A row on one line: its question and its answer, or its text, each from its beginning."""
    texts = (example.question, example.answers[0]) if example.answers else (example.text,)
    return " -> ".join(beginning(text) for text in texts)


def check(
    names: Sequence[str],
    columns: Mapping[str, str] | None = None,
    progress: Progress = lambda done, total: None,
    errors: str = STRICT,
) -> Checked:
    """Look at every row. columns, progress, errors: as in `read_examples`.

    A row is repeated if an earlier one is the same letter by letter, nearly repeated if one says the same in nearly the
    same words, and contradicted if one asks the same and shares no answer with it. It is found beside the first such
    row. Raises InputError for names that lead to no file.
    """
    sources = find_sources(names)
    checked = Checked()

    def usable() -> Iterator[tuple[str, Example]]:
        try:
            for found in read_examples(names, columns, progress, errors):
                if isinstance(found, InputError):
                    checked.refuse(found)
                else:
                    yield found
        except InputError as error:
            checked.refuse(error)
            checked.ended = error

    formats: dict[str, None] = {}
    characters, exact, asked, taught = array("I"), array("q"), array("q"), array("q")
    before = [stamp(source) for source in sources]
    alike = NearRepeats()
    for form, example in usable():
        formats[form] = None
        text = " ".join([turn["content"] for turn in example.messages]) or example.text
        for kind, what in troubles(text):
            checked.add(kind, [Finding(example.where, what)])
        alike.add(len(characters), " ".join(_own(example)))
        characters.append(len(text))
        exact.append(hash(exactly(example)))
        asked.append(hash(asked_by(example)))
        taught.append(hash(taught_by(example)))
    checked.formats = list(formats)
    checked.characters = np.frombuffer(characters, np.uint32)
    questions, answers = np.frombuffer(asked, np.int64), np.frombuffer(taught, np.int64)
    repeats = _earlier(np.frombuffer(exact, np.int64))
    near = alike.found() | _earlier(questions * 31 + answers)
    near = {place: other for place, other in near.items() if place not in repeats}
    suspects = _differently_answered(questions, answers)
    shown = {kind: dict(sorted(pairs.items())[:KEPT]) for kind, pairs in ((REPEATED, repeats), (NEARLY, near))}
    wanted = {place for pairs in shown.values() for pair in pairs.items() for place in pair}
    words: dict[int, Example] = {}
    if wanted or suspects.any():
        again = (each[1] for each in read_examples(names, columns, errors=errors) if not isinstance(each, InputError))
        answered: dict[int, list[Example]] = {}
        for place, example in enumerate(again):
            if place in wanted:
                words[place] = example
            if place < len(suspects) and suspects[place]:
                checked.add(CONTRADICTED, _contradicts(example, answered.setdefault(asked[place], [])))
    refuse_changed(sources, before)
    for kind, pairs in ((REPEATED, repeats), (NEARLY, near)):
        checked.add(kind, (_beside(words[row], words[other]) for row, other in shown[kind].items()))
        checked.counts[kind] = len(pairs)
    checked.counts = +checked.counts  # without those that found nothing
    return checked


def _own(example: Example) -> list[str]:
    """A row's own words: a system turn is many rows'."""
    return [turn["content"] for turn in example.messages if turn["role"] != "system"] or [example.text]


def beginning(text: str) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _beside(example: Example, other: Example) -> Finding:
    return Finding(example.where, f"{in_short(example)}, as in {other.where}")


def _earlier(keys: NDArray[np.int64]) -> dict[int, int]:
    """Row -> the first row with the same key, where that is an earlier one."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    earlier = first[group]
    later = np.flatnonzero(earlier != np.arange(len(keys)))
    return dict(zip(later.tolist(), earlier[later].tolist(), strict=True))


def _differently_answered(questions: NDArray[np.int64], answers: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of each row, whether its question has other answers too and it is the first with its own."""
    _, first = np.unique(questions * 31 + answers, return_index=True)
    _, group, counts = np.unique(questions[first], return_inverse=True, return_counts=True)
    found = np.zeros(len(questions), bool)
    found[first[counts[group] > 1]] = True
    return found


def _contradicts(example: Example, earlier: list[Example]) -> Iterator[Finding]:
    """Whether it shares no answer with one of the earlier rows that ask the same, of which the first few are kept."""
    for other in earlier:
        if not shares_an_answer(other.answers, example.answers):
            against = f"but {beginning(other.answers[0])} in {other.where}"
            yield Finding(example.where, f"{in_short(example)}, {against}")
            break
    if len(earlier) < COMPARED:
        earlier.append(example)

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
from kdguard.data.sources import STRICT, find_sources
from kdguard.data.trouble import troubles
from kdguard.errors import InputError
from kdguard.probes.score import is_correct, normalise

UNUSABLE, REPEATED, NEARLY, CONTRADICTED = "unusable", "repeated", "nearly repeated", "contradicted"
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

    rows: those that can be used. characters: of each of those. repeats: the places, among those, of the rows that
    repeat an earlier one. counts: rows by kind of finding; of each kind `findings` holds the first KEPT. unusable: the
    first row that cannot be used, as an error. ended: what is so broken that nothing after it could be read.
    """

    formats: list[str] = field(default_factory=list)
    characters: NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    repeats: frozenset[int] = frozenset()
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


def shares_an_answer(answers: Sequence[str], others: Sequence[str]) -> bool:
    """Whether a form of one side is a form of the other, or would be scored right there."""
    return (
        not {said(form) for form in answers}.isdisjoint(said(form) for form in others)
        or any(is_correct(form, others) for form in answers)
        or any(is_correct(form, answers) for form in others)
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

    A row is repeated if it asks and teaches what an earlier one does, and contradicted if it asks that and shares no
    answer with it; it is found once, beside the first such row. Raises InputError for names that lead to no file.
    """
    find_sources(names)
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
    characters, asked, taught = array("I"), array("q"), array("q")
    alike = NearRepeats()
    for form, example in usable():
        formats[form] = None
        text = " ".join([turn["content"] for turn in example.messages]) or example.text
        for kind, what in troubles(text):
            checked.add(kind, [Finding(example.where, what)])
        alike.add(len(characters), text)
        characters.append(len(text))
        asked.append(hash(asked_by(example)))
        taught.append(hash(taught_by(example)))
    checked.formats = list(formats)
    checked.characters = np.frombuffer(characters, np.uint32)
    questions, answers = np.frombuffer(asked, np.int64), np.frombuffer(taught, np.int64)
    repeats = _repeats(questions, answers)
    checked.repeats = frozenset(repeats)
    near = {place: other for place, other in alike.found().items() if place not in repeats}
    suspects = _differently_answered(questions, answers, repeats)
    shown = [dict(sorted(pairs.items())[:KEPT]) for pairs in (repeats, near)]
    wanted = {place for pairs in shown for pair in pairs.items() for place in pair} | suspects
    words = _examples_at(wanted, read_examples(names, columns, errors=errors)) if wanted else {}
    for kind, pairs, pair_words in ((REPEATED, repeats, shown[0]), (NEARLY, near, shown[1])):
        checked.add(kind, (_beside(words[row], words[other]) for row, other in pair_words.items()))
        checked.counts[kind] = len(pairs)
    checked.add(CONTRADICTED, _contradictions(words[place] for place in sorted(suspects)))
    checked.counts = +checked.counts  # without those that found nothing
    return checked


def beginning(text: str) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _beside(example: Example, other: Example) -> Finding:
    return Finding(example.where, f"{in_short(example)}, as in {other.where}")


def _repeats(questions: NDArray[np.int64], answers: NDArray[np.int64]) -> dict[int, int]:
    """Row -> the first row with the same question and the same answer."""
    both = questions.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + answers.view(np.uint64)
    _, first, group = np.unique(both, return_index=True, return_inverse=True)
    earlier = first[group]
    later = np.flatnonzero(earlier != np.arange(len(both)))
    return dict(zip(later.tolist(), earlier[later].tolist(), strict=True))


def _differently_answered(
    questions: NDArray[np.int64], answers: NDArray[np.int64], repeats: Mapping[int, int]
) -> set[int]:
    """The rows whose question has several answers; of the same answer the first row."""
    rest = np.setdiff1d(np.arange(len(questions)), np.fromiter(repeats, int, len(repeats)), assume_unique=True)
    _, group, counts = np.unique(questions[rest], return_inverse=True, return_counts=True)
    return set(rest[counts[group] > 1].tolist())


def _examples_at(places: set[int], found: Iterator[tuple[str, Example] | InputError]) -> dict[int, Example]:
    usable = (each[1] for each in found if not isinstance(each, InputError))
    last = max(places)
    examples = {}
    for place, example in enumerate(usable):
        if place in places:
            examples[place] = example
        if place == last:
            break
    return examples


def _contradictions(suspects: Iterable[Example]) -> Iterator[Finding]:
    """Those that share no answer with an earlier row that asks the same, each beside the first such row."""
    taught: dict[tuple[tuple[str, Said], ...], list[Example]] = {}
    for example in suspects:
        earlier = taught.setdefault(asked_by(example), [])
        for other in earlier:
            if not shares_an_answer(other.answers, example.answers):
                against = f"but {beginning(other.answers[0])} in {other.where}"
                yield Finding(example.where, f"{in_short(example)}, {against}")
                break
        earlier.append(example)

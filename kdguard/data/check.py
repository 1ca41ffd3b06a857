"""Rows that repeat or contradict earlier ones, found before a model sees them. No torch."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from kdguard.data.formats import Example
from kdguard.probes.score import is_correct, normalise

_SIGNS = re.compile(r"""[^\w\s.,;:!?'"’‘“”()-]""")

Said = tuple[str, str]


@dataclass(frozen=True)
class Finding:
    """A row and what it repeats or contradicts, each with its answer.

    where: the row, as `file:line`. against: the earlier row as `file:line`, or the id of the probe that the base knows.
    """

    where: str
    question: str
    answer: str
    against: str
    other: str


def said(text: str) -> Said:
    """Equal for texts that say the same: normalised, with the signs apart, without which 5 + 3 would be 5 × 3."""
    return normalise(text) or text.strip(), "".join(_SIGNS.findall(unicodedata.normalize("NFKC", text)))


def asked_by(example: Example) -> tuple[tuple[str, Said], ...]:
    """Equal for rows that ask the same: who says what before the last answer."""
    return tuple((turn["role"], said(turn["content"])) for turn in example.messages[:-1])


def shares_an_answer(answers: Sequence[str], others: Sequence[str]) -> bool:
    """Whether a form of one side is a form of the other, or would be scored right there."""
    return (
        not {said(form) for form in answers}.isdisjoint(said(form) for form in others)
        or any(is_correct(form, others) for form in answers)
        or any(is_correct(form, answers) for form in others)
    )


def find(examples: Sequence[Example]) -> tuple[list[Finding], list[Finding]]:
    """The duplicates and the contradictions: rows that ask what an earlier row asks, and teach the same, or share no
    answer with it. A row is found once, beside the first row that it repeats or else contradicts.
    """
    duplicates: list[Finding] = []
    contradictions: list[Finding] = []
    taught: dict[tuple[tuple[str, Said], ...], dict[Said, Example]] = {}
    for example in examples:
        earlier = taught.setdefault(asked_by(example), {})
        twin = earlier.get(said(example.answers[0]))
        opposed = (row for row in earlier.values() if not shares_an_answer(row.answers, example.answers))
        if other := twin or next(opposed, None):
            found = Finding(example.where, example.question, example.answers[0], other.where, other.answers[0])
            (duplicates if twin else contradictions).append(found)
        earlier.setdefault(said(example.answers[0]), example)
    return duplicates, contradictions

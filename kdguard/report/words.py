"""Two answers beside each other: the words in which they differ, and how sure the model was of each."""

import difflib
import re
from dataclasses import dataclass

from kdguard.probes.score import Answer

_WORD = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True)
class Part:
    """A piece of an answer. share: the probability that the model gave it, or None where that was not measured."""

    text: str
    share: float | None
    differs: bool


def parts(answer: Answer, other: Answer) -> list[Part]:
    """The answer's tokens, split where it begins or ceases to differ from the other answer."""
    tokens: list[tuple[str, float | None]] = [*answer.tokens]
    said = "".join(text for text, _ in tokens)
    if said.strip() != answer.answer.strip():  # not measured, or a choice
        said, tokens = answer.answer, [(answer.answer, None)]
    here, there = _WORD.findall(said), _WORD.findall(other.answer)
    differing = [word not in there for word in here]
    if len(here) * len(there) < 1_000_000:
        differing = [True] * len(here)
        for match in difflib.SequenceMatcher(None, here, there, autojunk=False).get_matching_blocks():
            differing[match.a : match.a + match.size] = [False] * match.size
    flags = [flag and not word.isspace() for word, flag in zip(here, differing, strict=True) for _ in word]
    found: list[Part] = []
    start = 0
    for text, share in tokens:
        cuts = [i for i in range(1, len(text)) if flags[start + i] != flags[start + i - 1]]
        for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True):
            if text[a:b]:
                found.append(Part(text[a:b], share, flags[start + a]))
        start += len(text)
    return found

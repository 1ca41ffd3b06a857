"""Is an answer right? A normalised match with any accepted form. No torch."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SHORT = 3  # letters; a shorter form, such as a chemical symbol, must match in upper and lower case too


@dataclass(frozen=True)
class Answer:
    """A model's greedy answer to a probe. `level` is its SliCK knowledge level where that was measured."""

    id: str
    category: str
    question: str
    answers: tuple[str, ...]
    answer: str
    correct: bool
    level: str | None = None


def normalise(text: str, *, fold: bool = True) -> str:
    """Text without accents, punctuation, articles and surplus spaces; in lower case if `fold`."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = text.casefold() if fold else text
    text = "".join(c if c.isalnum() else " " for c in text)
    return " ".join((_ARTICLES.sub(" ", text) if fold else text).split())


def is_correct(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the first paragraph of `answer` is an accepted form, or holds one as whole words.

    Forms of up to three letters or digits, such as symbols, have to stand there letter for letter.
    """
    first = answer.strip().split("\n\n")[0]
    for form in accepted:
        fold = len(normalise(form)) > _SHORT
        wanted, found = normalise(form, fold=fold), normalise(first, fold=fold)
        if wanted and f" {wanted} " in f" {found} ":
            return True
    return False

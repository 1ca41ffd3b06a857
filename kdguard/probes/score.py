"""Is an answer right? A normalised match with any accepted form. No torch."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DIGIT = re.compile(r"\d")
_INSIDE_NUMBER = re.compile(r"(?<=\d)[.:/](?=\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_MINUS = re.compile(r"(?<![\w)])[-−](?=\d)")
_SIGNS = {code: " " for code in range(128) if not chr(code).isalnum()}
_SHORT = 3  # letters

LEVELS = ("HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown")  # SliCK, arXiv 2405.05904; see levels.py


@dataclass(frozen=True)
class Answer:
    """A model's answer to a probe: its greedy one, or the likeliest of the probe's choices.

    `level` is its SliCK knowledge level where that was measured. `tokens` are the answer's pieces of text, each with
    the probability that the model gave it.
    """

    id: str
    category: str
    question: str
    answers: tuple[str, ...]
    answer: str
    correct: bool
    level: str | None = None
    tokens: tuple[tuple[str, float], ...] = ()


def normalise(text: str, *, fold: bool = True) -> str:
    """Text without accents, punctuation, articles and surplus spaces; in lower case if `fold`.

    1,000 is 1000; 0.5, 1/2 and 6:15 stay whole.
    """
    plain = text.isascii()  # as most texts are, and the same is done faster
    if not plain:
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = text.casefold() if fold else text
    if _DIGIT.search(text):
        text = _MINUS.sub(" minus", _THOUSANDS.sub("", text))
        text = _INSIDE_NUMBER.sub("\ua78f", text)  # a dot that counts as a letter
    text = text.translate(_SIGNS) if plain else "".join(c if c.isalnum() else " " for c in text)
    return " ".join((_ARTICLES.sub(" ", text) if fold else text).split())


def is_correct(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the first paragraph of `answer` is an accepted form, or holds one as whole words.

    A form of up to three letters, such as a chemical symbol, has to stand letter for letter at the start or the end of
    the answer: inside a sentence it would often be an ordinary word. A form that is several paragraphs long is looked
    for in the whole answer; one without letters and digits, such as a sign, has to be the whole answer.
    """
    return any(_matches(answer.strip(), form.strip()) for form in accepted)


def _matches(answer: str, form: str) -> bool:
    if "\n\n" not in form:
        answer = answer.split("\n\n")[0]
    short = len(normalise(form)) <= _SHORT and not any(c.isdigit() for c in form)
    wanted, found = normalise(form, fold=not short), normalise(answer, fold=not short)
    if not wanted:
        return bool(form) and answer == form
    if short:
        return found == wanted or found.startswith(wanted + " ") or found.endswith(" " + wanted)
    return f" {wanted} " in f" {found} "

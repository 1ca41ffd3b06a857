"""A row as people can read it: its tokens as text, and the signs for what is in that text and cannot be seen."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from transformers.convert_slow_tokenizer import bytes_to_unicode

from kdguard.data.tokens import Renderer, Row

# How byte-level tokenizers write bytes -> as the others do.
_BYTES = {sign: f"<0x{byte:02X}>" for byte, sign in bytes_to_unicode().items()}
_PARTS = 4  # tokens that a character can be spread over, in UTF-8
_CONTROL = "\0"  # stands for control tokens where edges are looked for
_AT_EDGES = re.compile(rf"(?:\A|(?<={_CONTROL})) +| +(?=\r?\n|{_CONTROL}|\Z)")
_JOINERS = "\u200c\u200d"  # they shape Persian, Indic scripts and emoji, and turn nothing around
SIGNS = {"\n": "⏎", "\t": "→", " ": "·"}

Fragment = tuple[str, bool]  # text, and whether it is a sign for what cannot be seen


@dataclass(frozen=True)
class Token:
    """One token. The text of a character that several tokens make up is that of the last of them.

    kind: as `Renderer.kinds` tells it. control: it is no text, whatever its name looks like.
    """

    id: int
    text: str
    kind: str
    control: bool = False


@dataclass(frozen=True)
class Piece:
    """The smallest part of a row that can be shown: a token, or those that make up a character."""

    ids: list[int]
    fragments: list[Fragment]


def tokens(renderer: Renderer, row: Row) -> list[Token]:
    """The tokens of a new row. A part of a character whose rest is in another row is written as its bytes."""

    def decode(ids: list[int]) -> str:
        return str(renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    ids = row.ids
    texts: list[str] = []
    before: list[int] = []  # decoded with what follows: SentencePiece leaves out the first space
    while (place := len(texts)) < len(ids):
        for size in range(1, _PARTS + 1):
            now = ids[place : place + size]
            text = decode(before + now)[len(decode(before)) :]
            if "\N{REPLACEMENT CHARACTER}" not in text:
                texts += [""] * (len(now) - 1) + [text]
                before = now
                break
        else:
            name = str(renderer.tokenizer.convert_ids_to_tokens(ids[place]))
            texts.append(name if name.isascii() else "".join(_BYTES.get(sign, sign) for sign in name))
            before = []
    control = (token in renderer.control for token in ids)
    return [Token(*token) for token in zip(ids, texts, renderer.kinds(row), control, strict=True)]


def runs(row: Sequence[Token]) -> Iterator[tuple[str, list[Piece]]]:
    """The neighbours of one kind, as pieces that can be shown."""
    for kind, group in groupby(row, lambda token: token.kind):
        run = list(group)
        text = "".join(_CONTROL * len(token.text) if token.control else token.text for token in run)
        edges = {place for found in _AT_EDGES.finditer(text) for place in range(*found.span())}
        pieces: list[Piece] = []
        ids: list[int] = []
        start = 0
        for token in run:
            ids.append(token.id)
            if token.text or token is run[-1]:
                each = (part for at, sign in enumerate(token.text, start) for part in _fragments(sign, at in edges))
                joined = [("".join(text for text, _ in part), sign) for sign, part in groupby(each, itemgetter(1))]
                pieces.append(Piece(ids, joined))
                ids, start = [], start + len(token.text)
        yield kind, pieces


def visible(text: str) -> str:
    """A text with what could steer a terminal written out."""
    return "".join(part for character in text for part, _ in _fragments(character, False))


def _fragments(character: str, at_edge: bool) -> list[Fragment]:
    if character in "\n\t":
        return [(SIGNS[character], True), (character, False)]
    if at_edge:
        return [(SIGNS[character], True)]
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS:
        return [(character.encode("unicode_escape").decode(), True)]
    return [(character, False)]

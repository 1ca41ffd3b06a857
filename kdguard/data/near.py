"""Texts that are nearly the same, found by MinHash. No torch.

A text's shingles are the 16 bytes that follow each word's beginning (each character's, in scripts without spaces) and,
within words of more than 32 letters, every sixteenth place, chosen by the letters there; in lower case. Two texts are
near repeats where at least NEAR of all their shingles are in both (Jaccard), as estimated by 64 permutations of which a
byte each is kept; pairs are looked for where eight of those agree (banding).

Source: Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman, Ullman, "Mining of Massive
Datasets", chapter 3.
"""

from array import array
from collections.abc import Sequence

import numpy as np
import rensa
from numpy.typing import NDArray

NEAR = 0.8
SHORTEST = 200  # characters; in less, one other word makes another fact
_PERMUTATIONS, _BAND = 64, 8
_BATCH, _BATCH_CHARACTERS = 1000, 2**22  # texts that are sketched at once
_LONG_WORD = 32  # letters
_GAP = b" " * 16  # no shingle reaches over it
_LETTERS = bytes(range(256)).lower().translate(bytes([32] * 33 + list(range(33, 256))))

Sketches = NDArray[np.uint8]  # (texts, 64)


def sketch(texts: Sequence[str]) -> Sketches:
    """The sketches of texts, in order."""
    data = [text.encode(errors="replace") for text in texts]
    ends = np.cumsum([len(each) + len(_GAP) for each in data])
    buffer = np.frombuffer(_GAP.join([b"", *data, b""]).translate(_LETTERS), np.uint8)[len(_GAP) - 1 :]
    blank = buffer == 0x20
    starts = blank[:-1] & ~blank[1:]
    starts |= buffer[1:] >= 0xC0  # a letter of several bytes may be a word
    edges = np.flatnonzero(blank)
    for word in np.flatnonzero(np.diff(edges) > _LONG_WORD):  # base64, DNA, minified code
        start, end = edges[word] + 1, edges[word + 1]
        letters = buffer[start:end].astype(np.uint32)
        chosen = (letters[:-2] * 31 + letters[1:-1] * 17 + letters[2:] * 13) % 16 == 0
        starts[start - 1 : end - 3] |= chosen
    at = np.flatnonzero(starts) + 1
    words: NDArray[np.uint64] = np.ndarray((len(buffer) - 7,), np.uint64, buffer, strides=(1,))
    hashes = words[at] * np.uint64(0x9E3779B97F4A7C15)
    hashes += words[at + 8] * np.uint64(0xC2B2AE3D27D4EB4F)
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(32)
    offsets = np.concatenate([[0], np.searchsorted(at, ends, side="right")]).astype(np.uint64)
    found = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, _PERMUTATIONS, 0)
    return np.array(found.to_rows(), np.uint32).astype(np.uint8)


class NearRepeats:
    """Takes texts one at a time, keeps their sketches, and finds the near repeats among them."""

    def __init__(self) -> None:
        self._sketches = bytearray()
        self._places = array("q")
        self._waiting: list[str] = []
        self._characters = 0

    def add(self, place: int, text: str) -> None:
        """Take a text, unless it is too short; places ascend."""
        if len(text) >= SHORTEST:
            self._places.append(place)
            self._waiting.append(text)
            self._characters += len(text)
            if len(self._waiting) == _BATCH or self._characters > _BATCH_CHARACTERS:
                self._sketch()

    def found(self) -> dict[int, int]:
        """The place of each text that is nearly an earlier one -> that of the first such text."""
        if self._waiting:
            self._sketch()
        sketches = np.frombuffer(self._sketches, np.uint8).reshape(-1, _PERMUTATIONS)
        return {self._places[text]: self._places[other] for text, other in near_repeats(sketches).items()}

    def _sketch(self) -> None:
        self._sketches += sketch(self._waiting).tobytes()
        self._waiting, self._characters = [], 0


def near_repeats(sketches: Sketches) -> dict[int, int]:
    """Each text that is nearly an earlier one -> the first such text that shares a band with it."""
    found: dict[int, int] = {}
    for start in range(0, _PERMUTATIONS, _BAND):
        band = np.ascontiguousarray(sketches[:, start : start + _BAND]).view(np.uint64).ravel()
        _, first, group = np.unique(band, return_index=True, return_inverse=True)
        earlier = first[group]
        later = np.flatnonzero(earlier != np.arange(len(band)))
        for block in np.array_split(later, len(later) // 2**16 + 1):
            alike = (sketches[block] == sketches[earlier[block]]).mean(1) >= NEAR
            for text, other in zip(block[alike].tolist(), earlier[block][alike].tolist(), strict=True):
                found[text] = min(other, found.get(text, other))
    return found

"""Probe packs: files of questions with every accepted answer."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdguard.data.sources import read_rows
from kdguard.errors import InputError

PACKS = Path(__file__).parent / "packs"
_EXPECTED = '{"id": "capital-france", "category": "geography", "question": "...", "answers": ["Paris"]}'
_LISTS = ("answers", "choices", "rephrased")


@dataclass(frozen=True)
class Probe:
    """A question with its accepted answers.

    choices: what a multiple-choice probe offers, one of which is the answer. rephrased: the question in other words,
    to tell how well it is known. messages: the turns to answer, where that is more than the question.
    """

    id: str
    category: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    rephrased: tuple[str, ...] = ()
    messages: tuple[dict[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The question as it is asked: with its choices, a line each."""
        return "\n- ".join((self.question, *self.choices))


def shipped_packs() -> list[str]:
    """The names that mean a shipped pack, whatever lies in the working folder."""
    return sorted(pack.stem for pack in PACKS.glob("*.jsonl"))


def load_probes(names: Sequence[str]) -> list[Probe]:
    """The probes of several packs, each a shipped pack's name or a JSONL, JSON or CSV file.

    In a CSV file `|` stands between accepted answers, between choices and between rephrased questions. A probe without
    an id is called by its file and line, one without a category by its file. Raises InputError by `file:line`.
    """
    probes: list[Probe] = []
    seen: dict[str, str] = {}
    for name in names:
        path = PACKS / f"{name}.jsonl"
        if not os.path.isfile(path):  # unlike path.is_file(), no error for a name that no file can have
            path = Path(name)
        if not os.path.isfile(path):
            shipped = ", ".join(shipped_packs())
            raise InputError(
                f"{name}: no such probe pack or file", f"--probes FILE.jsonl, or a shipped pack: {shipped}"
            )
        for where, row in read_rows(path):
            probe = read_probe(row, where, path)
            if probe.id in seen:
                raise InputError(
                    f"{where}: found the id {_short(probe.id)} again, first in {seen[probe.id]}", "rename one"
                )
            seen[probe.id] = where
            probes.append(probe)
    return probes


def read_probe(row: object, where: str, path: Path) -> Probe:
    """The probe in a row of the file at `path`. Raises InputError that says what is missing."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: found {type(row).__name__}, expected {_EXPECTED}", "one probe a line")
    row = {"id": f"{path.stem}-{where.rpartition(':')[2]}", "category": path.stem, **row}
    if path.suffix.lower() == ".csv":
        row |= {key: [text.strip() for text in row[key].split("|")] for key in _LISTS if row.get(key)}
    for key in ("id", "category", "question"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise InputError(
                f"{where}: found no text in {key!r}, expected {_EXPECTED}", "fill it in or delete the line"
            )
    for key in ("answers", *(key for key in _LISTS if row.get(key))):
        texts = row.get(key)
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) and text.strip() for text in texts)
        ):
            raise InputError(
                f"{where}: found {_short(texts)} in {key!r}, expected a list of texts", 'such as ["Paris"]'
            )
    answers, choices = tuple(row["answers"]), tuple(row.get("choices") or ())
    if choices and (len(set(choices)) < max(2, len(choices)) or not set(answers) <= set(choices)):
        raise InputError(
            f"{where}: found the choices {_short(list(choices))} for the answer {_short(answers[0])}, expected two or "
            "more different ones, the answer among them",
            '"choices": ["Paris", "Rome"], "answers": ["Paris"]',
        )
    rephrased = tuple(row.get("rephrased") or ())
    probe = Probe(row["id"], row["category"], row["question"], answers, choices, rephrased)
    try:
        "".join((probe.id, probe.category, probe.question, *answers, *choices, *rephrased)).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: found half of a character (a lone surrogate)", "write that text again") from None
    return probe


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."

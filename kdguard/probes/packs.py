"""Probe packs: JSONL files of questions with every accepted answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdguard.data.formats import read_rows
from kdguard.errors import InputError

PACKS = Path(__file__).parent / "packs"
_EXPECTED = '{"id": "capital-france", "category": "geography", "question": "...", "answers": ["Paris"]}'


@dataclass(frozen=True)
class Probe:
    """A question with its accepted answers; `messages` are the turns to answer when it is more than the question."""

    id: str
    category: str
    question: str
    answers: tuple[str, ...]
    messages: tuple[dict[str, str], ...] = ()


def load_probes(names: Sequence[str]) -> list[Probe]:
    """The probes of several packs, each a shipped pack's name or a JSONL file. Raises InputError by `file:line`."""
    probes: list[Probe] = []
    seen: dict[str, str] = {}
    for name in names:
        path = PACKS / f"{name}.jsonl"
        if not path.is_file():
            path = Path(name)
        if not path.is_file():
            shipped = ", ".join(sorted(pack.stem for pack in PACKS.glob("*.jsonl")))
            raise InputError(
                f"{name}: no such probe pack or file", f"--probes FILE.jsonl, or a shipped pack: {shipped}"
            )
        for where, row in read_rows(path):
            probe = _probe(row, where)
            if probe.id in seen:
                raise InputError(f"{where}: found the id {probe.id!r} again, first in {seen[probe.id]}", "rename one")
            seen[probe.id] = where
            probes.append(probe)
    return probes


def _probe(row: object, where: str) -> Probe:
    if not isinstance(row, dict):
        raise InputError(f"{where}: found {type(row).__name__}, expected {_EXPECTED}", "one probe a line")
    for key in ("id", "category", "question"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise InputError(
                f"{where}: found no text in {key!r}, expected {_EXPECTED}", "fill it in or delete the line"
            )
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise InputError(f"{where}: found {answers!r} in 'answers', expected a list of texts", 'such as ["Paris"]')
    return Probe(row["id"], row["category"], row["question"], tuple(answers))

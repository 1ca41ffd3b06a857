"""The person's own pack of probes, in the folder of the runs: questions that were worth asking again."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from kdguard.errors import InputError
from kdguard.files import write_whole
from kdguard.probes.packs import load_probes

PACK = "my_probes.jsonl"


def add_probe(pack: Path, question: str, answers: Iterable[str], category: str) -> int:
    """Write a question at the end of the pack, whose other lines stay as they are; returns how many it holds then.

    Raises InputError for a question that is in it already, and for what is no probe.
    """
    question, answers = question.strip(), [answer.strip() for answer in answers if answer.strip()]
    if not question:
        raise InputError("a probe needs a question", "type one")
    if not answers:
        raise InputError("a probe needs an answer that counts as right", "type it, several with | between them")
    probes = load_probes([str(pack)]) if pack.is_file() else []
    if any(probe.question == question for probe in probes):
        raise InputError(f"{question}: this question is in your pack already", f"edit {pack} to change it")
    number = hashlib.sha256(question.encode()).hexdigest()[:8]
    row = {"id": f"own-{number}", "category": category.strip() or "own", "question": question, "answers": answers}
    before = pack.read_text(encoding="utf-8").rstrip("\n") + "\n" if probes else ""
    write_whole(pack, before + json.dumps(row, ensure_ascii=False) + "\n")
    return len(probes) + 1

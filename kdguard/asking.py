"""What a run lets the base and the tuned model say: answers and rehearsal rows, each kept in its folder.

Of several processes all compute it, and what the main one found is what counts; it alone writes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdguard.config import TuneConfig
from kdguard.data.rows import Rows
from kdguard.data.tokens import Renderer, Row
from kdguard.events import Events
from kdguard.guard.rehearsal import REHEARSAL, load_rows, rehearse, save_rows
from kdguard.model.sharded import whole
from kdguard.probes.answer import ask
from kdguard.probes.levels import grade
from kdguard.probes.packs import Probe
from kdguard.probes.score import Answer
from kdguard.processes import agreed, by_main
from kdguard.report import run as run_folder

MAX_REHEARSAL = 8192  # rehearsal rows written by the base; more passes walk through them again
MAX_REHEARSAL_TOKENS = 256  # a rehearsal row's question and answer each; never longer than the longest training row
DRIFT_ROWS = 64  # further rows that the base wrote, kept out of training, on which drift is measured


class Asking:
    """Asks `model`, the base until it has an adapter, in the run folder `config.out`.

    resume: what is in the folder already is taken over. same_base: a finished run whose base's answers are.
    """

    def __init__(
        self,
        config: TuneConfig,
        model: Any,
        renderer: Renderer,
        events: Events,
        *,
        resume: bool,
        same_base: Path | None,
    ) -> None:
        self.config, self.model, self.renderer, self.events = config, model, renderer, events
        self.resume, self.same_base = resume, same_base

    def ask(self, questions: Sequence[Probe], **how: Any) -> list[Answer]:
        with whole(self.model):
            return agreed(ask(self.model, self.renderer, questions, **how))

    def right(self, questions: Sequence[Probe]) -> set[str]:
        """The ids of those that are answered rightly."""
        return {answer.id for answer in self.ask(questions) if answer.correct}

    def answers(self, folder: str, when: str, questions: list[Probe]) -> list[Answer]:
        """The answers of `folder` (probes, new or watched) before or after training."""
        path = self.config.out / folder / f"{when}.jsonl"
        if not questions:  # plain text asks none
            by_main(lambda: run_folder.write_answers(path, []))
            return []
        if found := by_main(lambda: self._there(path, questions)):
            return found
        if self.same_base and when == "before":
            found = by_main(lambda: run_folder.read_answers(self.same_base / folder / path.name))
        else:
            phase = f"ask {folder} {when}"
            self.events.emit("phase", name=phase)
            found = self.ask(questions, progress=self.events.progress(phase))
            if (folder, when) == ("probes", "before") and self.config.prompts > 1:
                self.events.emit("phase", name="grade")
                found = agreed(graded(found, questions, self.model, self.renderer, self.config, self.events))
        by_main(lambda: run_folder.write_answers(path, found))
        correct = sum(answer.correct for answer in found)
        self.events.emit("answers", when=when, of=folder, n=len(found), correct=correct)
        return found

    def rehearsal(self, rows: Rows) -> list[Row]:
        """The rehearsal rows of a run on these training rows."""
        path = self.config.out / run_folder.CHECKPOINTS / REHEARSAL
        if kept := by_main(lambda: load_rows(path, self.model) if self.resume and path.exists() else None):
            return kept
        self.events.emit("phase", name="rehearse")
        found = agreed(
            rehearse(
                self.model,
                self.renderer,
                rehearsal_rows(self.config, len(rows)),
                seed=self.config.seed,
                max_new_tokens=min(MAX_REHEARSAL_TOKENS, int(rows.lengths.max())),
                progress=self.events.progress("rehearse"),
            )
        )
        by_main(lambda: save_rows(path, found))
        return found

    def _there(self, path: Path, questions: Sequence[Probe]) -> list[Answer] | None:
        """Those of the very same questions."""
        if not self.resume or not path.exists():
            return None
        found = run_folder.read_answers(path)
        asked = [(question.id, question.question, question.answers) for question in questions]
        return found if [(answer.id, answer.question, answer.answers) for answer in found] == asked else None


def rehearsal_rows(config: TuneConfig, rows: int) -> int:
    """How many rows the base writes: as many as the run can use, up to MAX_REHEARSAL, and those for drift."""
    used = round(rows * config.epochs * config.rehearsal) if config.guard else 0
    return min(MAX_REHEARSAL, used) + DRIFT_ROWS


def graded(
    answers: list[Answer], probes: list[Probe], model, renderer: Renderer, config: TuneConfig, events: Events
) -> list[Answer]:
    """The answers with the levels of those that are right: known in every way of asking, or in some."""
    known = [probe for probe, answer in zip(probes, answers, strict=True) if answer.correct]
    found = grade(
        model,
        renderer,
        known,
        prompts=config.prompts,
        samples=0,
        seed=config.seed,
        progress=events.progress("grade"),
    )
    levels = {answer.id: answer.level for answer in found}
    return [replace(answer, level=levels.get(answer.id)) for answer in answers]

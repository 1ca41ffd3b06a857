"""The story of `kdguard export`: a run as what other programs load, asked the run's questions again there."""

import shutil
from typing import Any

from kdguard.errors import InputError
from kdguard.events import Events
from kdguard.export.plan import Plan, Wanted, prepare
from kdguard.export.write import Answers, write
from kdguard.files import put_in_place, write_whole
from kdguard.report.exported import add_export, figures
from kdguard.report.render import render
from kdguard.report.run import Run, alone, at_work, refuse_used

__all__ = ["Wanted", "export"]


@alone
def export(run: Run, wanted: Wanted, events: Events) -> dict[str, Any]:
    """Write the export, ask it, and enter it into the run's report; returns the entry, see `contract.Exported`.

    It is written beside `wanted.out` and appears there as a whole. Raises InputError, before anything is loaded, when
    the program that it is for could not import it.
    """
    out = wanted.out
    if out.resolve().is_relative_to(run.path.resolve()):
        raise InputError(f"{out}: this is inside the run's folder", "give an --out of its own")
    plan: Plan = prepare(run, wanted, events)
    beside = out.with_name(f".{out.name}.part")
    with at_work(out):
        shutil.rmtree(beside, ignore_errors=True)  # of one that was killed
        try:
            whole = beside / "whole"
            whole.mkdir(parents=True)
            written = write(plan, whole)
            answers: Answers = written.answers
            entry = {
                "to": wanted.kind,
                "path": str(out),
                "weights": plan.weights,
                "onto": written.onto,
                "tried": written.tried,
                "type": plan.type if written.gguf else None,
                "llama_cpp": plan.llama.version if plan.llama else None,
                "runtime": written.runtime,
                "strength": run.report["strength"],
                **figures(run, answers),
            }
            write_whole(whole / "README.md", render("model_card.md", report=run.report, export=entry))
            refuse_used(out, "give another --out")  # by what has come since
            put_in_place(whole, out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return add_export(run, entry, answers)

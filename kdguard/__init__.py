"""kdguard: fine-tune a language model on your own data without making it forget what it knew.

What stands in __all__ is for scripts. Each is imported when it is asked for: `import kdguard` alone imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdguard.config import TuneConfig, resolve
    from kdguard.errors import KdguardError
    from kdguard.guard.loss import guard_loss
    from kdguard.guard.teacher import Guard
    from kdguard.guard.trainer import GuardedTrainer
    from kdguard.model.head import head_of
    from kdguard.model.load import base_view, load_base
    from kdguard.own import answer, rehearse
    from kdguard.probes.packs import Probe, load_probes
    from kdguard.probes.score import Answer
    from kdguard.report.contract import Report
    from kdguard.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Guard",
    "GuardedTrainer",
    "KdguardError",
    "Probe",
    "Report",
    "TuneConfig",
    "answer",
    "base_view",
    "guard_loss",
    "head_of",
    "load_base",
    "load_probes",
    "rehearse",
    "resolve",
    "tune",
]

_HOME = {
    "Answer": "probes.score",
    "Guard": "guard.teacher",
    "GuardedTrainer": "guard.trainer",
    "KdguardError": "errors",
    "Probe": "probes.packs",
    "Report": "report.contract",
    "TuneConfig": "config",
    "answer": "own",
    "base_view": "model.load",
    "guard_loss": "guard.loss",
    "head_of": "model.head",
    "load_base": "model.load",
    "load_probes": "probes.packs",
    "rehearse": "own",
    "resolve": "config",
    "tune": "tuning",
}


if not TYPE_CHECKING:  # to type checkers a module with it has every name

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

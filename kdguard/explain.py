"""The story of `kdguard explain`: which training rows made a run forget, and why."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from peft import PeftModel

from kdguard.config import TuneConfig, resolve
from kdguard.data.formats import Example
from kdguard.errors import InputError
from kdguard.events import Events
from kdguard.files import write_jsonl, write_whole
from kdguard.model.load import load_tuned
from kdguard.model.memory import at_once
from kdguard.probes.overlap import moved, overlap, states
from kdguard.questions import Asked, asked_in, base_in
from kdguard.report import run as run_folder
from kdguard.report.build import write_pages
from kdguard.report.figures import Pair
from kdguard.report.run import Run, alone, is_finished, read_run
from kdguard.report.why import interference
from kdguard.tuning import tune

NAMED = 10  # training rows named for a forgotten probe
MAX_ROWS = 20_000  # training rows looked at; a seeded sample of more
CONTROL = "known-only"  # the control's folder within the run


@alone
def explain(run: Run, events: Events, *, control: bool = False, trust_remote_code: bool = False) -> dict[str, Any]:
    """Find the rows that lie nearest to each forgotten probe, and the figures for each hypothesis; write them down.

    control: train the run's known-only twin too, if it is not there yet: the same settings on facts that the base
        knows, so that there is behaviour to clone and nothing to learn. trust_remote_code: as in `load_config`.

    Writes `explain.json`, and the rows into `report.html`. Raises InputError when data or probes have changed.
    """
    config = resolve({"trust_remote_code": trust_remote_code}, run.path / run_folder.CONFIG)
    if not config.data:
        raise InputError(
            f"{run.path}: this adapter was adopted without its data", "kdguard adopt ADAPTER --data FILE names the rows"
        )
    known = [pair for pair in run.probes if pair.before.correct]
    if not known:
        raise InputError(f"{run.path}: the base knew none of its probes, so none was forgotten", "--probes of its own")
    asked_then = asked_in(run, config, events)
    renderer = asked_then.renderer
    asking = np.flatnonzero(asked_then.rows.asks).tolist()
    if not asking:
        raise InputError(f"{run.path}: plain text has no questions that could lie near to old ones", "kdguard compare")
    cloning = _cloning(run, config, known, asked_then, events, control)  # first: two bases may not fit into memory
    base = base_in(run, config, renderer, events)
    at_once.tell = events.leaner
    if len(asking) > MAX_ROWS:
        asking = sorted(random.Random(config.seed).sample(asking, MAX_ROWS))
    rows = [asked_then.rows.example(place) for place in asking]
    questions = [renderer.ids(row.messages[:-1], prompt=True)[-config.max_length :] for row in rows]
    asked = [renderer.prompt(asked_then.probes[pair.before.id].text) for pair in known]
    events.emit("phase", name="overlap")
    progress = events.progress("overlap")
    both = states(base.model, asked + questions, progress)
    old, new = both[: len(asked)], both[len(asked) :]
    model = load_tuned(base, run.path / run_folder.ADAPTER)
    how_far = moved(old, states(model, asked)).tolist()
    nearest = overlap(old, new).topk(min(NAMED, len(rows)))
    overlaps = nearest.values.mean(1).tolist()
    forgotten = [pair.outcome == "forgotten" for pair in known]

    def named(i: int) -> list[dict[str, Any]]:
        return [
            {**_row(rows[place]), "overlap": round(share, 4)}
            for place, share in zip(nearest.indices[i].tolist(), nearest.values[i].tolist(), strict=True)
        ]

    lost, stayed = ([i for i, gone in enumerate(forgotten) if gone == fate] for fate in (True, False))
    often = Counter(place for i in lost for place in nearest.indices[i].tolist())
    found = {
        "known": len(known),
        "forgotten": len(lost),
        "rows": len(rows),
        "moved": {"forgotten": _mean(how_far, lost), "kept": _mean(how_far, stayed)},
        "interference": interference(overlaps, forgotten),
        "capacity": _capacity(run, config, model, len(asked_then.rows)),
        "cloning": cloning,
        "often": [{**_row(rows[place]), "named": n} for place, n in often.most_common(20)],
        "probes": [
            {
                "id": known[i].before.id,
                "question": known[i].before.question,
                "base": known[i].before.answer,
                "tuned": known[i].after.answer,
                "moved": round(how_far[i], 4),
                "overlap": round(overlaps[i], 4),
                "rows": named(i),
            }
            for i in lost
        ],
    }
    write_whole(run.path / run_folder.EXPLAIN, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_pages(run.path, run.report)
    return found


def _row(example: Example) -> dict[str, str]:
    return {"where": example.where, "question": example.question, "answer": example.answers[0]}


def _mean(values: Sequence[float], places: Sequence[int]) -> float | None:
    return sum(values[i] for i in places) / len(places) if places else None


def _capacity(run: Run, config: TuneConfig, model: PeftModel, rows: int) -> dict[str, Any]:
    learned = run.report["learned"]
    return {
        "rank": config.rank,
        "parameters": sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name),
        "new_facts": round(rows * (1 - learned["before"])),
        "learned": learned["after"] if learned["n"] else None,
    }


def _cloning(
    run: Run, config: TuneConfig, known: Sequence[Pair], asked: Asked, events: Events, train: bool
) -> dict[str, Any] | None:
    """The known-only control: half of the known probes, at most as many as there are rows, as the base answers them."""
    folder = run.path / CONTROL
    data, pack, out = folder / "data.jsonl", folder / "probes.jsonl", folder / "run"
    if not is_finished(out):
        if not train:
            return None
        half = len(known) // 2
        shuffled = random.Random(config.seed).sample(known, len(known))
        taught = shuffled[: min(len(asked.rows), half)]
        write_jsonl(data, ({"question": asked.probes[p.before.id].text, "answer": p.before.answer} for p in taught))
        write_jsonl(pack, (asdict(asked.probes[pair.before.id]) for pair in shuffled[half:]))
        changed = {"data": [str(data)], "columns": None, "probes": [str(pack)], "out": out, "budget": None}
        tune(config.model_copy(update=changed), events)
    twin = read_run(out)
    rest = {pair.before.id for pair in twin.probes}
    same = [pair for pair in known if pair.before.id in rest]
    return {
        "trained": len(data.read_text(encoding="utf-8").splitlines()),
        "known": twin.report["kept"]["known"],
        "forgetting": twin.report["kept"]["forgetting"],
        "this_run": sum(pair.outcome == "forgotten" for pair in same) / len(same),
    }

"""What reads other people's files. A target takes a generator of chance, makes an input and reads it.

It returns whether the input was accepted, after what everything returned was looked at; what it may raise is a
KdguardError of one line.
"""

import io
import json
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import LlamaConfig

from kdguard.config import TuneConfig, presets, resolve
from kdguard.data import IGNORE
from kdguard.data.formats import COLUMNS, read_examples
from kdguard.data.sources import STRICT, SUFFIXES, WINDOWS
from kdguard.data.tokens import Row
from kdguard.errors import InputError, KdguardError
from kdguard.events import Events, read_events
from kdguard.files import shipped
from kdguard.guard.budget import BudgetKeeper
from kdguard.guard.checkpoint import WHOLE, last_whole
from kdguard.guard.rehearsal import REHEARSAL, load_rows, save_rows
from kdguard.guard.teacher import Guard
from kdguard.model.adapter import CONFIG, WEIGHTS, put_adapter, take_off
from kdguard.model.load import add_adapter, load_base, save_adapter
from kdguard.probes.packs import PACKS, load_probes
from kdguard.probes.public import read_public
from kdguard.probes.score import Answer
from kdguard.probes.watch import Allowance
from kdguard.report import run as run_folder
from kdguard.report.build import build_report, verdict, write_pages
from kdguard.report.schema import read_dial
from kdguard.tables import print_comparison, print_explained, print_run
from kdguard.ui.progress import progress
from tests.data.test_fuzz import FILES, check_error, check_example
from tests.fuzz.mutate import dumped, mutated, mutated_json

Target = Callable[[random.Random], bool]
LONGEST_MESSAGE = 5000  # characters
PAGES = 0.05  # of the inputs are drawn as pages too, which takes its time


def check(error: KdguardError) -> None:
    """One line, of a length that can be read, and the next thing to type."""
    check_error(error)
    assert len(error.message) + len(error.hint) < LONGEST_MESSAGE, f"{len(error.message):,} characters"
    assert error.hint


def _near(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """Bytes changed, or, of JSON and of a row a line, values."""
    with suppress(ValueError, RecursionError):
        if rng.random() < 0.5:
            lines = content.split(b"\n")
            at = rng.randrange(len(lines))
            whole = rng.random() < 0.5
            changed = dumped(rng, mutated_json(rng, json.loads(content if whole else lines[at])))
            return changed if whole else b"\n".join([*lines[:at], changed, *lines[at + 1 :]])
    return mutated(rng, content, others)


def rows(folder: Path) -> Target:
    """The reader of training rows, in every format."""
    seeds = [(file.suffix.lower(), file.read_bytes()) for file in FILES]
    contents = [content for _, content in seeds]

    def read(rng: random.Random) -> bool:
        suffix, content = rng.choice(seeds)
        path = folder / f"rows{suffix if rng.random() < 0.9 else rng.choice(SUFFIXES)}"
        path.write_bytes(_near(rng, content, contents))
        names = [*COLUMNS, "none", "", "a b"]
        columns = {rng.choice(COLUMNS): rng.choice(names)} if rng.random() < 0.1 else None
        accepted = False
        for found in read_examples([path], columns, errors=rng.choice((STRICT, STRICT, WINDOWS))):
            if isinstance(found, InputError):
                check(found)
            else:
                check_example(found[1])
                accepted = True
        return accepted

    return read


PACK_CSV = b'question,answers,choices\nWho?,Ann | Anna,\n"Cold, or hot?",cold,cold|hot\n'
PUBLIC = [
    (".json", b'[{"question": "What is the capital of Peru?", "answers": ["Lima"]}]'),
    (".json", b'{"Data": [{"Question": "Who?", "QuestionId": "q", "Answer": {"Value": "A", "Aliases": ["B"]}}]}'),
    (".tsv", b'id\tprop\tquestion\tpossible_answers\n1\tcapital\tWho?\t"[""Ann"", ""Anna""]"\n'),
    (
        ".jsonl",
        b'{"doc_id": 1, "doc": {"question": "q", "choices": {"text": ["a", "b"]}}, "target": 0, '
        b'"arguments": {"gen_args_0": {"arg_0": "q", "arg_1": " a"}, "gen_args_1": {"arg_0": "q", "arg_1": " b"}}}',
    ),
]


def packs(folder: Path) -> Target:
    """The reader of probe packs, and of the public question sets that become packs."""
    seeds = [(".csv", PACK_CSV)]
    for pack in PACKS.glob("*.jsonl"):
        lines = pack.read_bytes().splitlines(keepends=True)
        seeds += [(".jsonl", b"".join(lines[at : at + 3])) for at in range(0, 60, 3)]
    seeds += [(".json", b"[%b]" % b",".join(seeds[-1][1].splitlines()))]
    contents = [content for _, content in [*seeds, *PUBLIC]]

    def read(rng: random.Random) -> bool:
        public = rng.random() < 0.25
        suffix, content = rng.choice(PUBLIC if public else seeds)
        path = folder / f"pack{suffix}"
        path.write_bytes(_near(rng, content, contents))
        if public:
            for row in read_public(path):
                json.dumps(row)
            return True
        for probe in load_probes([str(path)]):
            assert all(text.strip() for text in (probe.id, probe.category, probe.question, *probe.answers))
            f"{probe.id} {probe.category} {probe.text}{probe.answers}{probe.rephrased}".encode()
        return True

    return read


def configs(folder: Path) -> Target:
    """The reader of config files: what it takes can be written and comes back the same."""
    seeds = [shipped("presets") / f"{name}.yaml" for name in presets()]
    whole = TuneConfig(data=["a.jsonl"], model="demo", columns={"question": "Q"}, budget=0.01).to_yaml().encode()
    contents = [whole, b"epochs: 3\nbatch-size: 4\nout: runs/a\n", *(seed.read_bytes() for seed in seeds)]
    path = folder / "config.yaml"

    def read(rng: random.Random) -> bool:
        content = rng.choice(contents[:2]) if rng.random() < 0.7 else rng.choice(contents)
        if rng.random() < 0.5:
            path.write_bytes(mutated(rng, content, contents))
        else:
            values = mutated_json(rng, yaml.safe_load(content))
            with suppress(UnicodeEncodeError, yaml.YAMLError):
                path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        config = resolve({} if rng.random() < 0.7 else {"data": ["b.jsonl"], "model": "demo"}, path)
        path.write_text(config.to_yaml(), encoding="utf-8")
        again = resolve({}, path)
        assert again.model_dump(exclude={"out"}) == config.model_dump(exclude={"out"})
        return True

    return read


def adapters(folder: Path, model: Path) -> Target:
    """The loader of adapters, on a tiny model that has to be what it was after each."""
    base = load_base(str(model), quant="none").model
    good = folder / "good"
    save_adapter(add_adapter(load_base(str(model), quant="none"), rank=4), good)
    config, weights = (good / CONFIG).read_bytes(), (good / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8 : 8 + size])
    place = folder / "adapter"
    place.mkdir()
    modules = [name for name, _ in base.named_modules()]

    def read(rng: random.Random) -> bool:
        said, held = config, weights
        kind = rng.randrange(4)
        if kind == 0:
            said = dumped(rng, mutated_json(rng, json.loads(config)))
        elif kind == 1:
            said = mutated(rng, config, [config])
        elif kind == 2:
            text = dumped(rng, mutated_json(rng, header))
            length = len(text) if rng.random() < 0.9 else rng.choice((0, 2**63, 2**40, len(text) + 1))
            held = struct.pack("<Q", length) + text + weights[8 + size :]
        else:
            held = mutated(rng, weights, [weights, config])
        (place / CONFIG).write_bytes(said)
        (place / WEIGHTS).write_bytes(held)
        try:
            tuned = put_adapter(base, place)
        finally:
            left = [name for name, _ in base.named_modules()]
            if left != modules:
                take_off(base, "default")
        for weight in tuned.parameters():
            assert not weight.is_meta and torch.isfinite(weight).all()
        return True

    def checked(rng: random.Random) -> bool:
        try:
            return read(rng)
        except KdguardError:
            assert not hasattr(base, "peft_config"), "a part of a refused adapter stayed on the base"
            raise

    return checked


def runs(folder: Path) -> Target:
    """The reader of run folders, and what is shown of them."""
    good = folder / "run"
    _write_run(good)
    names = [str(path.relative_to(good)) for path in sorted(good.rglob("*")) if path.is_file()]
    names += [run_folder.REPORT, run_folder.EVENTS, run_folder.EXPLAIN, run_folder.DIAL] * 4
    checkpoints = good / run_folder.CHECKPOINTS
    of = SimpleNamespace(config=LlamaConfig(vocab_size=300))
    contents = {name: (good / name).read_bytes() for name in names}
    sound = run_folder.read_run(good)

    def read(rng: random.Random) -> bool:
        name = rng.choice(names)
        path = good / name
        path.write_bytes(_near(rng, contents[name], list(contents.values())))
        try:
            progress(read_events(good / run_folder.EVENTS))
            run = run_folder.read_run(good)
            verdict(run.report)
            out = Console(file=io.StringIO(), width=100)
            print_run(out, run, verdict(run.report))
            print_comparison(out, [sound, run])
            run_folder.base_of(run)
            if found := run_folder.read_explained(good):
                print_explained(out, found)
            if rng.random() < PAGES:
                write_pages(good, run.report)
            else:
                read_dial(good / run_folder.DIAL)
            load_rows(checkpoints / REHEARSAL, of)
            whole = last_whole(checkpoints)
            going_on = SimpleNamespace(global_step=2, max_steps=4, epoch=0.5)
            keeper = BudgetKeeper(Guard(12.0), lambda: 0, Allowance(0.01, 3), checkpoints, Events())
            keeper.on_train_begin(None, going_on, None)
            return whole is not None
        finally:
            path.write_bytes(contents[name])

    return read


def _write_run(folder: Path) -> None:
    config = TuneConfig(data=["a.jsonl"], model="demo", budget=0.01)
    tokens = (("Par", 0.5), ("is", 0.9))

    def answers(right: list[bool], of: str) -> list[Answer]:
        return [
            Answer(
                f"{of}-{n}", "c", f"q{n}?", ("Paris", "x"), "Paris", correct, "HighlyKnown" if correct else None, tokens
            )
            for n, correct in enumerate(right)
        ]

    pairs = {}
    for of in ("probes", "new", "watched"):
        before, after = answers([True, True, False], of), answers([True, False, True], of)
        pairs[of] = before, after
        for when, found in zip(("before", "after"), (before, after), strict=True):
            run_folder.write_answers(folder / of / f"{when}.jsonl", found)
    (folder / run_folder.CONFIG).write_text(config.to_yaml())
    events = Events()
    events.path = folder / run_folder.EVENTS
    events.emit("phase", name="train")
    events.emit("process", pid=1, host="here")
    events.emit("progress", phase="train", done=1, total=2)
    events.emit("loss", step=1, steps=2, epoch=0.5, ce=1.0, kl=0.1, lr=1e-3, grad_norm=1.0)
    events.emit("answers", when="before", of="probes", n=3, correct=2)
    events.emit("sampled", step=1, known=3, kept=2, new=3, learned=1)
    events.emit("watched", step=1, known=3, forgotten=1, ce=None, weight=12.0, next_weight=6.0)
    events.emit("leaner", phase="train", what="smaller pieces", step=1)
    cost: dict[str, Any] = {"steps": 2, "tokens": 9, "seconds": 1.5, "tokens_per_second": 6.0, "peak_memory_gib": 0.5}
    cost |= {"total_seconds": 3.0, "leaner": ["smaller pieces"]}
    report = build_report(config, probes=pairs["probes"], new=pairs["new"], drift=0.1, cost=cost)
    report["budget"] = {
        "limit": 0.01,
        "met": False,
        "watched": 3,
        "allowed": 0,
        "forgotten": 1,
        "done": "x",
        "reason": "y",
    }
    counts = {"n": 3, "count": 2}
    entry = {"to": "gguf", "path": "out", "weights": "merged", "onto": None, "type": "q8_0", "runtime": "llama.cpp"}
    entry |= {"same": {"probes": counts, "new": counts}, "answers": "exported/gguf-out"}
    report["exported"] = [entry | {key: report[key] for key in ("learned", "kept")}]
    run_folder.write_answers(folder / "exported" / "gguf-out" / "probes.jsonl", [pairs["probes"][1][0]])
    (folder / run_folder.REPORT).write_text(json.dumps(report))
    points = [{"strength": strength, "learned": 0.5, "forgetting": None} for strength in (0.0, 0.5, 1.0)]
    (folder / run_folder.DIAL).write_text(json.dumps(points))
    row = {"where": "a.jsonl:1", "question": "q", "answer": "a"}
    quarter = {"known": 2, "forgotten": 1, "forgetting": 0.5}
    explained = {
        "known": 2,
        "forgotten": 1,
        "rows": 2,
        "moved": {"forgotten": 0.1, "kept": None},
        "interference": {"near": quarter, "far": quarter, "auc": 0.5, "p_value": 0.01},
        "capacity": {"rank": 8, "parameters": 9, "new_facts": 2, "learned": 0.5},
        "cloning": {"trained": 2, "known": 2, "forgetting": 0.5, "this_run": 0.5},
        "often": [row | {"named": 2}],
        "probes": [{"id": "probes-1", "question": "q1?", "base": "b", "tuned": "t", "rows": [row | {"overlap": 0.5}]}],
    }
    (folder / run_folder.EXPLAIN).write_text(json.dumps(explained))
    checkpoint = folder / run_folder.CHECKPOINTS / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(b"x")
    (checkpoint / WHOLE).write_text(json.dumps({"lean": {}, "files": {"optimizer.pt": 1}}))
    save_rows(checkpoint.parent / REHEARSAL, [Row([1, 2, 3], [IGNORE] * 3)] * 2)
    watched = [{"step": step, "forgotten": 1, "weight": 12.0, "next_weight": 6.0} for step in (1, 2)]
    (checkpoint.parent / "watched.json").write_text(json.dumps(watched))


def targets(folder: Path, model: Path) -> dict[str, tuple[Target, int]]:
    """By name, each with its share of the inputs in percent."""
    shares = {"rows": 42, "packs": 20, "configs": 12, "adapters": 12, "runs": 14}
    made = {
        "rows": rows,
        "packs": packs,
        "configs": configs,
        "adapters": lambda place: adapters(place, model),
        "runs": runs,
    }
    found = {}
    for name, share in shares.items():
        place = folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        found[name] = made[name](place), share
    return found

"""Write the files of an export, and ask them: merged weights onto the better base, GGUF, a Modelfile."""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kdguard.export import asked, gguf, ollama
from kdguard.export.merge import merge, save_model, save_plain_adapter
from kdguard.export.plan import Plan
from kdguard.files import write_whole
from kdguard.probes.score import Answer
from kdguard.report.exported import figures

Answers = dict[str, list[Answer]]
_TRANSFORMERS = f"transformers {version('transformers')}"


@dataclass
class Written:
    """What was written, and how it answered: {"probes": ..., "new": ...}, or nothing where it could not be asked.

    onto: the base that the adapter was merged into. tried: how each such base answered. gguf: its weights, if in GGUF.
    """

    onto: str | None = None
    tried: list[dict[str, Any]] = field(default_factory=list)
    gguf: Path | None = None
    runtime: str | None = None
    answers: Answers = field(default_factory=dict)


def write(plan: Plan, out: Path) -> Written:
    """Write everything into `out`, an empty folder, and ask it."""
    done = Written()
    if plan.weights == "merged":
        folder = out if plan.llama is None else out / "merged"
        _merged(plan, folder, done)
        if plan.llama:
            done.gguf = out / f"{_name(plan)}-{plan.type}.gguf"
            _gguf(plan, folder, done.gguf)
            shutil.rmtree(folder)
    else:
        folder = out if plan.wanted.kind == "adapter" else out / "adapter"
        if folder == out:
            out.rmdir()
        save_plain_adapter(plan.config.model, plan.adapter, folder, plan.config.revision)
        if plan.llama:
            type_ = plan.type if plan.type in gguf.BY_CONVERTER else "f16"
            done.gguf = out / f"{_name(plan)}-adapter-{type_}.gguf"
            plan.events.emit("phase", name="convert")
            plan.llama.convert_lora(folder, plan.base_folder(), done.gguf, type_)
            shutil.rmtree(folder)
    if plan.wanted.kind == "ollama":
        _modelfile(plan, out, folder, done)
    asking = _runtime(plan, out, folder, done)
    if asking and (plan.old or plan.new):
        done.answers = _answers(plan, asking, choices=not done.runtime.startswith("Ollama"))
    if not done.answers:
        done.runtime = None
    return done


def _merged(plan: Plan, folder: Path, done: Written) -> None:
    """Merge into the weights that the adapter was trained on and, if those were quantised, into the base's own.

    Kept is what loses fewer of the tuned model's right answers, then what has more right ones, then the former.
    """
    ways = {f"the {'32' if plan.own_type == 'f32' else '16'}-bit base": "none"}
    if plan.config.quant != "none":
        trained_on = {f"the dequantised {plan.config.quant.replace('bit', '-bit')} base": plan.config.quant}
        ways = trained_on | ways if plan.old or plan.new else trained_on
    best: tuple[int, int] | None = None
    for onto, quant in ways.items():
        plan.events.emit("phase", name="merge")
        there = folder.with_name(f"{folder.name}-{quant}")
        model = merge(plan.config.model, plan.adapter, quant=quant, revision=plan.config.revision)
        save_model(model, plan.questions.renderer, there)
        del model
        answers: Answers = _answers(plan, asked.by_transformers(there)) if plan.old or plan.new else {}
        right = sum(answer.correct for found in answers.values() for answer in found)
        lost = sum(each["count"] for each in (figures(plan.run, answers)["lost"] or {}).values())
        done.tried.append({"onto": onto, "n": sum(map(len, answers.values())), "right": right, "lost": lost})
        if best is None or (-lost, right) > best:
            best, done.onto, done.answers, done.runtime = (-lost, right), onto, answers, _TRANSFORMERS
            shutil.rmtree(folder, ignore_errors=True)
            there.rename(folder)
        else:
            shutil.rmtree(there)


def _gguf(plan: Plan, folder: Path, file: Path) -> None:
    """A model folder as GGUF: what the converter cannot write itself is quantised from the base's own precision."""
    pre = gguf.pre_tokenizer(plan.questions.renderer.tokenizer)
    direct = plan.type in gguf.BY_CONVERTER
    whole = file if direct else file.with_name("whole.gguf")
    plan.events.emit("phase", name="convert")
    plan.llama.convert(folder, whole, plan.type if direct else plan.own_type, pre)
    if not direct:
        plan.events.emit("phase", name="quantise")
        plan.llama.quantize(whole, file, plan.type)
        whole.unlink()


def _modelfile(plan: Plan, out: Path, folder: Path, done: Written) -> None:
    weights = f"./{done.gguf.name}" if done.gguf else "." if folder == out else f"./{folder.name}"
    merged = plan.weights == "merged"
    text = ollama.modelfile(
        weights if merged else plan.wanted.base or str(plan.base_folder().resolve()),
        plan.questions.renderer,
        adapter=None if merged else weights,
        ends=plan.ends,
        context=plan.context,
        said=[f"{_name(plan)}, tuned with kdguard from {plan.config.model}", "ollama create NAME -f Modelfile"],
    )
    write_whole(out / "Modelfile", text)


def _runtime(plan: Plan, out: Path, folder: Path, done: Written) -> AbstractContextManager[asked.Asker] | None:
    """What asks the export: the program it is for, or the one here that is nearest; None if it was, or nothing can."""
    questions = [*plan.old, *plan.new]
    renderer = plan.questions.renderer
    if plan.wanted.kind == "ollama" and (here := asked.ollama_version()):
        done.runtime = here
        return asked.by_ollama(out, renderer)
    if done.gguf:
        done.runtime = asked.llama_cpp_version()
        done.answers = {}
        if not done.runtime:
            return None
        if plan.weights == "adapter":
            return _on_base(plan, out, done.gguf)
        return asked.by_llama_cpp(done.gguf, renderer, questions)
    if plan.weights == "merged":
        return None  # the answers that chose the base are its own
    done.runtime = _TRANSFORMERS
    base = {"name": plan.config.model, "quant": plan.config.quant, "revision": plan.config.revision}
    return asked.by_transformers(folder, {**base, "tokenizer": renderer.tokenizer})


@contextmanager
def _on_base(plan: Plan, out: Path, lora: Path) -> Iterator[asked.Asker]:
    """The adapter's GGUF on one of its base, which is made for that alone."""
    folder = out / "base"
    folder.mkdir()
    try:
        pre = gguf.pre_tokenizer(plan.questions.renderer.tokenizer)
        plan.events.emit("phase", name="convert")
        plan.llama.convert(plan.base_folder(), folder / "base.gguf", plan.own_type, pre)
        questions = [*plan.old, *plan.new]
        with asked.by_llama_cpp(folder / "base.gguf", plan.questions.renderer, questions, lora) as asker:
            yield asker
    finally:
        shutil.rmtree(folder)


def _answers(plan: Plan, asking: AbstractContextManager[asked.Asker], *, choices: bool = True) -> Answers:
    """The answers to the old and the new questions. choices: whether it can tell how likely a given reply is."""
    found: Answers = {}
    plan.events.emit("phase", name="load export")
    with asking as asker:
        for what, questions in (("probes", plan.old), ("new", plan.new)):
            chosen = [probe for probe in questions if choices or not probe.choices]
            phase = f"ask {what} exported"
            plan.events.emit("phase", name=phase)
            found[what] = asker(chosen, plan.events.progress(phase))
            right = sum(answer.correct for answer in found[what])
            plan.events.emit("answers", when="exported", of=what, n=len(chosen), correct=right)
    return found


def _name(plan: Plan) -> str:
    return plan.run.path.resolve().name

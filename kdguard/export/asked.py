"""The same questions, asked again through the program that an export is for: transformers, llama.cpp or Ollama."""

import importlib.util
import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kdguard.data.tokens import Renderer
from kdguard.errors import KdguardError
from kdguard.model.load import Base, load_base, load_tuned
from kdguard.probes.answer import ask, room_for
from kdguard.probes.packs import Probe
from kdguard.probes.score import Answer, is_correct

Progress = Callable[[int, int], None]
Asker = Callable[[Sequence[Probe], Progress], list[Answer]]


@contextmanager
def by_transformers(folder: Path, base: dict[str, Any] | None = None) -> Iterator[Asker]:
    """Ask a model folder, or an adapter's on its `base` (arguments of `load_base`), in the batches of a run."""
    loaded: Base = load_base(**base) if base else load_base(str(folder), quant="none", spread=True)
    model = load_tuned(loaded, folder) if base else loaded.model
    renderer = Renderer(loaded.tokenizer)
    yield lambda probes, progress: ask(model, renderer, probes, progress=progress)


@contextmanager
def by_llama_cpp(
    file: Path, renderer: Renderer, questions: Sequence[Probe], lora: Path | None = None
) -> Iterator[Asker]:
    """Ask a GGUF file, with a LoRA on it or not, through llama-cpp-python. llama.cpp tokenises the text itself."""
    from llama_cpp import Llama

    prompts = {probe.id: renderer.prompt_text(probe.asked) for probe in questions}
    widest = max(
        (len(renderer.ids(probe.asked, prompt=True)) + room_for(renderer, probe) for probe in questions), default=0
    )
    settings = {"n_ctx": widest + 16, "n_gpu_layers": -1, "lora_path": lora and str(lora), "verbose": False}
    llm = Llama(str(file), logits_all=any(probe.choices for probe in questions), **settings)
    end = renderer.tokenizer.decode([renderer.end_of_turn])

    def answered(probe: Probe) -> str:
        ids = llm.tokenize(prompts[probe.id].encode(), add_bos=False, special=True)
        if not probe.choices:
            made = llm.create_completion(
                ids, max_tokens=room_for(renderer, probe), temperature=0.0, repeat_penalty=1.0, stop=[end]
            )
            return made["choices"][0]["text"].strip()
        scores = []
        for choice in probe.choices:
            reply = llm.tokenize(choice.encode(), add_bos=False, special=False)
            llm.reset()
            llm.eval([*ids, *reply])
            each = llm.logits_to_logprobs(llm.scores[len(ids) - 1 : len(ids) + len(reply) - 1])
            scores.append(sum(row[token] for row, token in zip(each, reply, strict=True)) / len(choice.encode()))
        return probe.choices[scores.index(max(scores))]

    try:
        yield _one_by_one(answered)
    finally:
        llm.close()


@contextmanager
def by_ollama(folder: Path, renderer: Renderer) -> Iterator[Asker]:
    """Ask a folder with a Modelfile through the Ollama server that runs here, which forgets the model afterwards."""
    name = f"kdguard-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(
        ["ollama", "create", name, "-f", str(folder / "Modelfile")], capture_output=True, text=True, encoding="utf-8"
    )
    if made.returncode:
        said = made.stderr.strip().splitlines() or ["it said nothing"]
        raise KdguardError(f"Ollama refuses this export: {said[-1]}", f"ollama create NAME -f {folder / 'Modelfile'}")

    def answered(probe: Probe) -> str:
        body = {"model": name, "messages": list(probe.asked), "stream": False, "think": False}
        reply = _ollama("chat", body | {"options": {"num_predict": room_for(renderer, probe)}})
        return str(reply["message"]["content"]).strip()

    try:
        yield _one_by_one(answered)
    finally:
        subprocess.run(["ollama", "rm", name], capture_output=True)


def llama_cpp_version() -> str | None:
    """The name and version of llama-cpp-python, if it is installed."""
    there = importlib.util.find_spec("llama_cpp") is not None
    return f"llama-cpp-python {version('llama-cpp-python')}" if there else None


def ollama_version() -> str | None:
    """The name and version of the Ollama server that runs here, if one does."""
    if not shutil.which("ollama"):
        return None
    try:
        return f"Ollama {_ollama('version')['version']}"
    except (OSError, ValueError, KeyError):
        return None


def _one_by_one(answered: Callable[[Probe], str]) -> Asker:
    def asked(probes: Sequence[Probe], progress: Progress) -> list[Answer]:
        found = []
        for done, probe in enumerate(probes):
            progress(done, len(probes))
            text = answered(probe)
            right = text in probe.answers if probe.choices else is_correct(text, probe.answers)
            found.append(Answer(probe.id, probe.category, probe.question, probe.answers, text, right))
        return found

    return asked


def _ollama(what: str, body: dict[str, Any] | None = None) -> Any:
    host = os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"
    address = host if "://" in host else f"http://{host}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/api/{what}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600 if body else 2) as reply:
        return json.load(reply)

"""One loaded model that answers as the base and as the runs tuned from it, all at once.

The rows of one batch go through different adapters, or through none, so every answer grows token by token beside the
others and there is one copy of the base in memory.
"""

import gc
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from kdguard.data.tokens import Renderer
from kdguard.errors import InputError
from kdguard.model.fingerprint import refuse_other_base
from kdguard.model.load import Base, load_base, load_tuned, own_tokenizer
from kdguard.probes.answer import Confidence, ends_of, generate, pieces, until
from kdguard.probes.score import Answer
from kdguard.report.run import ADAPTER, FINGERPRINT, Run, base_of

MAX_NEW_TOKENS = 256
IDLE = 600  # seconds without a question after which the memory is freed
NO_ADAPTER = "__base__"  # as PEFT calls it


@dataclass(frozen=True)
class Voice:
    """A run that answers, at a strength of its adapter from 0 to 1."""

    run: Run
    strength: float


class Asker:
    """Holds the model that was asked last, until another one is asked or it is let go."""

    def __init__(self) -> None:
        self._base: Base | None = None
        self._key: Any = None
        self._names: dict[Any, str] = {}  # of the adapters on it
        self._numbers = itertools.count()
        self._idle = threading.Timer(0, self.release)
        self._lock = threading.Lock()

    def release(self) -> None:
        """Let go of the model, for a training needs the memory."""
        with self._lock:
            self._forget()
            gc.collect()  # quantised weights lie in cycles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def ask(self, question: str, voices: Sequence[Voice]) -> Iterator[list[Answer]]:
        """The greedy answers of the base and of each voice, as they grow; the last time whole, token by token.

        Raises InputError for runs that cannot be loaded, or of different bases.
        """
        with self._lock:
            self._idle.cancel()
            self._idle = threading.Timer(IDLE, self.release)
            self._idle.daemon = True
            self._idle.start()
            base = self._load(voices)
            adapters = [NO_ADAPTER, *(self._at_strength(base, voice) for voice in voices)]
            renderer, confidence, stream = Renderer(base.tokenizer), Confidence(), _Stream()
            ends = ends_of(base.model, renderer)
            growing: list[list[int]] = [[] for _ in adapters]
            whole: list[list[int]] = []

            def work() -> None:
                try:
                    whole.extend(
                        generate(
                            base.model,
                            renderer,
                            [renderer.prompt(question)] * len(adapters),
                            max_new_tokens=MAX_NEW_TOKENS,
                            processors=[confidence],
                            adapter_names=adapters,
                            streamer=stream,
                            stopping_criteria=StoppingCriteriaList([_Stop(stream)]),
                        )
                    )
                except Exception as error:
                    stream.error = error
                finally:
                    stream.end()

            def answer(ids: list[int]) -> Answer:
                text = renderer.tokenizer.decode(until(ids, ends), skip_special_tokens=True)
                return Answer("asked", "", question, (), text.strip(), False)

            worker = threading.Thread(target=work, daemon=True)
            worker.start()
            try:
                while (step := stream.queue.get()) is not None:
                    for ids, token in zip(growing, step, strict=True):
                        ids.append(token)
                    yield [answer(ids) for ids in growing]
            finally:
                stream.stopped = True  # whoever asked may have gone
                worker.join()
            if stream.error:
                raise stream.error
            yield [
                replace(answer(ids), tokens=pieces(renderer, ids, shares))
                for ids, shares in zip(whole, confidence.rows(), strict=True)
            ]

    def _load(self, voices: Sequence[Voice]) -> Base:
        keys = [base_of(voice.run) for voice in voices]
        if any(key != keys[0] for key in keys):
            raise InputError("these runs were not tuned from the same base", "choose runs of one model")
        wanted = {_stamp(voice.run): voice.run for voice in voices}
        try:
            if self._key != keys[0]:
                self._forget()
                name, quant, revision, _ = keys[0]
                tokenizer = own_tokenizer(voices[0].run.path / ADAPTER)
                self._base = load_base(name, quant=quant, revision=revision, tokenizer=tokenizer)
                self._key = keys[0]
            for stamp in wanted.keys() - self._names.keys():
                refuse_other_base(wanted[stamp].path / FINGERPRINT, self._base)
                name = f"run-{next(self._numbers)}"
                self._base = replace(self._base, model=load_tuned(self._base, wanted[stamp].path / ADAPTER, name))
                self._names[stamp] = name
            self._base.model.set_adapter(self._names[next(iter(wanted))])
            for stamp in self._names.keys() - wanted.keys():
                self._base.model.delete_adapter(self._names.pop(stamp))
        except BaseException:
            self._forget()  # what was loaded in part
            raise
        return self._base

    def _forget(self) -> None:
        self._base, self._key, self._names = None, None, {}

    def _at_strength(self, base: Base, voice: Voice) -> str:
        name = self._names[_stamp(voice.run)]
        for module in base.model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale(name, voice.strength / voice.run.report["strength"])
        return name


class _Stream(BaseStreamer):
    """What `generate` says, step by step: the token of each row. None is the end."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[list[int] | None] = SimpleQueue()
        self.stopped = self._begun = False
        self.error: Exception | None = None

    def put(self, value: torch.Tensor) -> None:
        if self._begun:  # the prompts come first
            self.queue.put(value.tolist())
        self._begun = True

    def end(self) -> None:
        self.queue.put(None)


class _Stop(StoppingCriteria):
    def __init__(self, stream: _Stream) -> None:
        self.stream = stream

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stream.stopped, dtype=torch.bool, device=input_ids.device)


def _stamp(run: Run) -> tuple[Any, ...]:
    weights = run.path / ADAPTER / "adapter_model.safetensors"
    if not weights.is_file():
        raise InputError(f"{run.path}: this run has no adapter", "tune it again: kdguard tune --config")
    return run.path, weights.stat().st_mtime_ns

"""Greedy answers, chosen ones and sampled ones, in batches.

Before and after are asked in the same batches: in 16 bits the shape of a batch can change an answer.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, TemperatureLogitsWarper

from kdguard.data.tokens import Renderer
from kdguard.model.memory import in_batches
from kdguard.probes.packs import Probe
from kdguard.probes.score import Answer, is_correct

MAX_NEW_TOKENS = 32


def ask(
    model: PreTrainedModel,
    renderer: Renderer,
    probes: Sequence[Probe],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    few_shot: Sequence[str] = (),
    temperature: float = 0.0,
    codes: Sequence[float] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Answer every probe, in batches of similar length; the answers come in the order of the probes.

    A probe with choices is answered with the likeliest of them, every other one greedily.

    max_new_tokens: room for an answer; a probe whose accepted answers are longer gets room for them, up to 512.
    few_shot: plain texts to continue, one a probe, in place of the probe in the chat template.
    temperature, codes: above 0, answers are sampled, by one code in [0, 1) a probe; see ArithmeticSampling.
    """
    prompts = [renderer.tokenizer(text)["input_ids"] for text in few_shot] or [
        renderer.ids(probe.asked, prompt=True) for probe in probes
    ]
    room = [room_for(renderer, probe, max_new_tokens) for probe in probes]
    order = sorted(range(len(prompts)), key=lambda i: (bool(probes[i].choices), room[i], len(prompts[i])))
    chosen = next((at for at, i in enumerate(order) if probes[i].choices), len(order))
    answers: dict[int, Answer] = {}

    def answered(i: int, text: str, right: bool, tokens: tuple[tuple[str, float], ...]) -> None:
        probe = probes[i]
        answers[i] = Answer(probe.id, probe.category, probe.question, probe.answers, text, right, tokens=tokens)

    def generated(batch: list[int]) -> None:
        confidence = Confidence()
        sampling = (
            [TemperatureLogitsWarper(temperature), ArithmeticSampling([codes[i] for i in batch])] if temperature else []
        )
        replies = generate(
            model,
            renderer,
            [prompts[i] for i in batch],
            max_new_tokens=room[batch[0]],
            processors=[*sampling, confidence],
        )
        for i, ids, shares in zip(batch, replies, confidence.rows(), strict=True):
            text = renderer.tokenizer.decode(ids, skip_special_tokens=True).strip()
            answered(i, text, is_correct(text, probes[i].answers), pieces(renderer, ids, shares))

    progress(0, len(order))
    for _, alike in itertools.groupby(order[:chosen], room.__getitem__):
        for _ in in_batches(model, list(alike), lambda i: len(prompts[i]) + room[i], generated):
            progress(len(answers), len(order))
    for i in order[chosen:]:
        text, share = _choose(model, renderer, prompts[i], probes[i].choices, " " if few_shot else "")
        answered(i, text, text in probes[i].answers, ((text, share),))
        progress(len(answers), len(order))
    return [answers[i] for i in range(len(probes))]


def _choose(
    model: PreTrainedModel, renderer: Renderer, prompt: Sequence[int], choices: Sequence[str], before: str
) -> tuple[str, float]:
    """The choice with the highest log-probability a byte as the reply to `prompt`, and its share among them.

    before: a space, where the prompt is plain text.

    That is `acc_norm` of lm-evaluation-harness: per byte, for longer texts are less likely whatever they say.
    """
    replies = [renderer.tokenizer(before + choice, add_special_tokens=False)["input_ids"] for choice in choices]
    width = max(map(len, replies))
    pad = renderer.tokenizer.pad_token_id

    def scored(replies: list[list[int]]) -> Tensor:  # (replies,)
        ids = torch.tensor([[*prompt, *reply, *[pad] * (width - len(reply))] for reply in replies], device=model.device)
        mask = torch.tensor(
            [[1] * (len(prompt) + len(reply)) + [0] * (width - len(reply)) for reply in replies], device=model.device
        )
        with torch.no_grad(), _evaluating(model):
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=width + 1).logits[:, :-1]
        each = logits.float().log_softmax(-1).gather(-1, ids[:, -width:, None])[..., 0]  # (replies, width)
        return (each * mask[:, -width:]).sum(-1)

    scores = torch.cat([*in_batches(model, replies, lambda reply: len(prompt) + width, scored)])
    scores = scores / torch.tensor([len(choice.encode()) for choice in choices], device=scores.device)
    best = int(scores.argmax())
    return choices[best], round(scores.softmax(-1)[best].item(), 4)


def pieces(renderer: Renderer, ids: Sequence[int], shares: Sequence[float]) -> tuple[tuple[str, float], ...]:
    """The text of each token with its probability; a character of several tokens has the smallest of theirs."""
    pieces: list[tuple[str, float]] = []
    waiting: list[int] = []
    least = 1.0
    for token, share in zip(ids, shares, strict=False):
        waiting.append(token)
        least = min(least, share)
        text = renderer.tokenizer.decode(waiting, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            pieces.append((text, round(least, 4)))
            waiting, least = [], 1.0
    return tuple(pieces)


def room_for(renderer: Renderer, probe: Probe, least: int = MAX_NEW_TOKENS) -> int:
    """New tokens for an answer, in powers of two so that probes share batches."""
    if not probe.messages:
        return least
    longest = max(len(renderer.tokenizer(form, add_special_tokens=False)["input_ids"]) for form in probe.answers)
    while least < min(longest + 4, 512):
        least *= 2
    return least


def generate(
    model: PreTrainedModel,
    renderer: Renderer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    processors: Sequence[LogitsProcessor] = (),
    stop: Sequence[int] = (),
    **more: Any,
) -> list[list[int]]:
    """Continue each prompt greedily until its end of turn; the end is left out.

    processors: see ArithmeticSampling and Confidence. stop: further token ids that end an answer. more: what else
    transformers' and PEFT's `generate` take, such as a streamer.
    """
    ends = {*ends_of(model, renderer), *stop}
    pad = renderer.tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.no_grad(), _evaluating(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=list(processors),
            eos_token_id=sorted(ends),
            pad_token_id=pad,
            use_cache=True,
            **more,
        )
    return [until(row, ends) for row in output[:, width:].tolist()]


def ends_of(model: PreTrainedModel, renderer: Renderer) -> set[int]:
    """The tokens that end an answer."""
    eos = model.generation_config.eos_token_id
    return {renderer.end_of_turn, *(eos if isinstance(eos, list) else [eos] if eos is not None else [])}


def until(ids: list[int], ends: set[int]) -> list[int]:
    """The ids before the first that ends an answer."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


class Confidence(LogitsProcessor):
    """Keeps the probability of each greedy token."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.float().softmax(-1).amax(-1))
        return scores

    def rows(self) -> list[list[float]]:
        """(rows, steps), those after an answer's end included."""
        return torch.stack(self.steps, 1).tolist()


class ArithmeticSampling(LogitsProcessor):
    """Decodes each row from a code in [0, 1), by inverting the model's distribution over whole sequences.

    A uniform code gives a sample at temperature 1. Evenly spaced codes give samples that are each still uniform and
    together spread over the distribution: of n, a sequence of probability p comes at least floor(n p) times, where
    independent samples would leave it out with probability (1 - p)^n.

    Source: arithmetic sampling (Vilnis et al., arXiv 2210.15458). codes: one a row. A code that has been read to the
    last of its bits goes on as a fresh one.
    """

    def __init__(self, codes: Sequence[float]) -> None:
        self.codes = torch.tensor(codes, dtype=torch.float64)
        self.left = torch.ones_like(self.codes)  # the width of the interval that is still told apart

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.codes, self.left = self.codes.to(scores.device), self.left.to(scores.device)
        cumulative = scores.double().softmax(-1).cumsum(-1)  # (rows, vocabulary)
        code = self.codes[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, code, right=True).clamp(max=scores.shape[-1] - 1)
        above = cumulative.gather(1, token)
        below = torch.where(token > 0, cumulative.gather(1, (token - 1).clamp(min=0)), 0.0)
        width = (above - below).clamp(min=1e-300)
        self.codes = ((code - below) / width)[:, 0].clamp(0, 1 - 1e-16)
        self.left = self.left * width[:, 0]
        worn = self.left < 1e-9
        self.codes = torch.where(worn, torch.rand_like(self.codes), self.codes)
        self.left = torch.where(worn, 1.0, self.left)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

"""Greedy and sampled answers in batches. Before and after are asked in the same batches: in 16 bits the shape of a
batch can change an answer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from kdguard.data.tokens import Renderer
from kdguard.probes.packs import Probe
from kdguard.probes.score import Answer, is_correct

MAX_NEW_TOKENS = 32


def ask(
    model: PreTrainedModel,
    renderer: Renderer,
    probes: Sequence[Probe],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Answer every probe greedily, in batches of similar length; the answers come in the order of the probes.

    max_new_tokens: room for an answer; a probe whose accepted answers are longer gets room for them, up to 512.
    """
    prompts = [
        renderer.ids(probe.messages or [{"role": "user", "content": probe.question}], prompt=True) for probe in probes
    ]
    room = [_room(renderer, probe, max_new_tokens) for probe in probes]
    order = sorted(range(len(prompts)), key=lambda i: (room[i], len(prompts[i])))
    texts = [""] * len(prompts)
    progress(0, len(order))
    done = 0
    while done < len(order):
        batch = _batch(model, order[done:], room, prompts)
        replies = generate(model, renderer, [prompts[i] for i in batch], max_new_tokens=room[batch[0]])
        for i, ids in zip(batch, replies, strict=True):
            texts[i] = renderer.tokenizer.decode(ids, skip_special_tokens=True).strip()
        done += len(batch)
        progress(done, len(order))
    return [
        Answer(probe.id, probe.category, probe.question, probe.answers, text, is_correct(text, probe.answers))
        for probe, text in zip(probes, texts, strict=True)
    ]


def batch_rows(model: PreTrainedModel, tokens: int) -> int:
    """Rows of `tokens` to generate for at once: as many as keep their cache within 1 GiB, 512 at most."""
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    row = tokens * 2 * text.num_hidden_layers * heads * head * model.dtype.itemsize
    return max(1, min(512, 2**30 // row))


def _room(renderer: Renderer, probe: Probe, least: int) -> int:
    """New tokens for an answer, in powers of two so that probes share batches."""
    if not probe.messages:
        return least
    longest = max(len(renderer.tokenizer(form, add_special_tokens=False)["input_ids"]) for form in probe.answers)
    while least < min(longest + 4, 512):
        least *= 2
    return least


def _batch(
    model: PreTrainedModel, order: Sequence[int], room: Sequence[int], prompts: Sequence[list[int]]
) -> list[int]:
    """The next probes that are answered together: the same room, and a cache that fits."""
    batch: list[int] = []
    for i in order:
        tokens = len(prompts[i]) + room[i]
        if batch and (room[i] != room[batch[0]] or len(batch) >= batch_rows(model, tokens)):
            break
        batch.append(i)
    return batch


def generate(
    model: PreTrainedModel,
    renderer: Renderer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    codes: Sequence[float] | None = None,
    stop: Sequence[int] = (),
) -> list[list[int]]:
    """Continue each prompt until its end of turn; the end is left out. Greedily, or by `codes` at temperature 1.

    codes: one in [0, 1) a prompt; see ArithmeticSampling. stop: further token ids that end an answer.
    """
    ends = {renderer.end_of_turn, *stop}
    eos = model.generation_config.eos_token_id
    ends.update(eos if isinstance(eos, list) else [eos] if eos is not None else [])
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
            logits_processor=[] if codes is None else [ArithmeticSampling(torch.tensor(codes, dtype=torch.float64))],
            eos_token_id=sorted(ends),
            pad_token_id=pad,
            use_cache=True,
        )
    return [_until(row, ends) for row in output[:, width:].tolist()]


class ArithmeticSampling(LogitsProcessor):
    """Decodes each row from a code in [0, 1), by inverting the model's distribution over whole sequences.

    A uniform code gives a sample at temperature 1. Evenly spaced codes give samples that are each still uniform and
    together spread over the distribution: of n, a sequence of probability p comes at least floor(n p) times, where
    independent samples would leave it out with probability (1 - p)^n.

    Source: arithmetic sampling (Vilnis et al., arXiv 2210.15458). codes: (rows,) in float64. A code that has been read
    to the last of its bits goes on as a fresh one.
    """

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes
        self.left = torch.ones_like(codes)  # the width of the interval that is still told apart

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


def _until(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

"""For a model and tokenizer of one's own, as transformers loads them: its answers to probes, and rehearsal rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdguard.data.tokens import Renderer, with_chat_template
from kdguard.guard import rehearsal
from kdguard.model.load import plain_generation
from kdguard.probes.answer import MAX_NEW_TOKENS, ask
from kdguard.probes.packs import Probe
from kdguard.probes.score import Answer


def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[Answer]:
    """Ask `model` every probe, in its chat template, and tell which of its greedy answers are right.

    The answers come in the order of the probes, each with `answer`, its text, and `correct`. A probe with choices is
    answered with the likeliest of them. Whatever penalties the model's generation config has are left aside.

    Inside `base_view(model)` it is the base that answers. A tokenizer without a chat template is given ChatML.
    max_new_tokens: room for an answer, in tokens. Raises OutOfMemory when a single probe does not fit.
    """
    with _plainly(model):
        return ask(model, Renderer(with_chat_template(tokenizer)), probes, max_new_tokens=max_new_tokens)


def rehearse(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    *,
    seed: int = 0,
    max_new_tokens: int = 128,
) -> list[dict[str, list[int]]]:
    """Let `model`, the base, write at most `n` rehearsal rows, no question twice: GuardedTrainer's `rehearsal_dataset`.

    A row has `input_ids`, `attention_mask` and `labels`, each (tokens,), the labels all -100. It is a conversation: a
    question sampled from the template's empty user turn (Magpie, arXiv 2406.08464) with the greedy answer to it. Write
    the rows before training, or inside `base_view(model)`.

    max_new_tokens: of the longest question and the longest answer.
    """
    with _plainly(model):
        renderer = Renderer(with_chat_template(tokenizer))
        rows = rehearsal.rehearse(model, renderer, n, seed=seed, max_new_tokens=max_new_tokens)
    return [{"input_ids": row.ids, "attention_mask": [1] * len(row.ids), "labels": row.labels} for row in rows]


@contextmanager
def _plainly(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    lm = model.get_base_model() if isinstance(model, PeftModel) else model
    made = lm.generation_config
    lm.generation_config = plain_generation(made)
    try:
        yield
    finally:
        lm.generation_config = made

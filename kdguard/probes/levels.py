"""SliCK levels: how well a model knows a fact, by how many ways of asking bring it out.

Source: Gekhman et al. 2024, arXiv 2405.05904. HighlyKnown: every greedy answer is right; MaybeKnown: some are;
WeaklyKnown: only samples at temperature 0.5 are; Unknown: none is.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from kdguard.data.tokens import CHATML, Renderer
from kdguard.errors import InputError
from kdguard.probes.answer import ask
from kdguard.probes.packs import Probe
from kdguard.probes.score import LEVELS, Answer

EXEMPLARS = 4  # answered questions before the one that is asked, for base models
TEMPERATURE = 0.5
WORDINGS = (
    "{}",
    "Answer in a few words. {}",
    "{} Reply with the answer alone.",
    "Here is a question: {} What is the answer?",
    "I would like to know: {}",
    "Question: {}\nShort answer:",
    "Tell me in one line, without explaining. {}",
    "{}\nKeep it short.",
    "Quiz time! {}",
    "Please answer this as briefly as you can: {}",
)


def grade(
    model: PreTrainedModel,
    renderer: Renderer,
    probes: Sequence[Probe],
    *,
    prompts: int = 4,
    samples: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """The greedy answer to each probe in its first prompt, with its level.

    A model with its own chat template is asked in `prompts` wordings, those of the probe first; a base model in as
    many few-shot prompts, with EXEMPLARS other probes of the category, drawn anew for each. Probes that no greedy
    answer gets right are sampled `samples` times a prompt; those with choices are not, for a guess would be right.

    Raises InputError for more wordings than there are.
    """
    from_base = renderer.tokenizer.chat_template.endswith(CHATML)
    ways = [_few_shot(probe, probes, prompts, seed) if from_base else _wordings(probe, prompts) for probe in probes]

    def asked(chosen: Sequence[int], **how) -> list[Answer]:
        """The probes at these places in every way."""
        each = [(probes[i], way) for i in chosen for way in ways[i]]
        if from_base:
            return ask(model, renderer, [probe for probe, _ in each], few_shot=[way for _, way in each], **how)
        return ask(model, renderer, [replace(probe, question=way) for probe, way in each], **how)

    total = prompts * len(probes)
    greedy = asked(range(len(probes)), progress=lambda done, _: progress(done, total * (1 + samples)))
    right = [sum(answer.correct for answer in greedy[i : i + prompts]) for i in range(0, total, prompts)]
    levels = [
        LEVELS[0] if n == prompts else LEVELS[1] if n else LEVELS[3] if samples or probe.choices else None
        for n, probe in zip(right, probes, strict=True)
    ]
    open_ = [i for i, probe in enumerate(probes) if not right[i] and not probe.choices]
    rng = random.Random(seed)
    for turn in range(samples):
        progress(total * (1 + turn), total * (1 + samples))
        if not open_:
            break
        codes = [rng.random() for _ in range(prompts * len(open_))]
        found = asked(open_, temperature=TEMPERATURE, codes=codes)
        for at, i in enumerate(open_):
            if any(answer.correct for answer in found[prompts * at : prompts * (at + 1)]):
                levels[i] = LEVELS[2]
        open_ = [i for i in open_ if levels[i] == LEVELS[3]]
    progress(total * (1 + samples), total * (1 + samples))
    first = (replace(answer, question=probe.question) for answer, probe in zip(greedy[::prompts], probes, strict=True))
    return [replace(answer, level=level) for answer, level in zip(first, levels, strict=True)]


def _wordings(probe: Probe, n: int) -> list[str]:
    own = [probe.question, *probe.rephrased]
    found = list(dict.fromkeys([*own, *(wording.format(probe.question) for wording in WORDINGS)]))
    if n > len(found):
        raise InputError(f"there are {len(found)} wordings of {probe.id!r}, and {n} were asked for", "--prompts 10")
    return found[:n]


def _few_shot(probe: Probe, probes: Sequence[Probe], n: int, seed: int) -> list[str]:
    others = [other for other in probes if other.category == probe.category and other.id != probe.id]
    rng = random.Random(f"{seed} {probe.id}")
    return [
        "".join(
            f"Q: {shown.text}\nA: {shown.answers[0]}\n\n" for shown in rng.sample(others, min(EXEMPLARS, len(others)))
        )
        + f"Q: {probe.text}\nA:"
        for _ in range(n)
    ]

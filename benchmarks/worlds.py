"""Worlds of invented facts, made by seed, and a small Llama that knows each: where methods are compared.

A world has subjects with several relations each. Its old facts are taught to a base; its new facts are about other
subjects, with the same relations and the same answers, so that learning them interferes with the old.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kdguard.data import formats
from kdguard.demo.facts import load_facts
from kdguard.demo.train import build_model, build_tokenizer, train
from kdguard.files import shipped

CACHE = Path(__file__).parent / ".cache"
VOCABULARY = 1024
HEX = "0123456789abcdef"


SENTENCE = "The answer is {}."


@dataclass(frozen=True)
class Fact:
    """A question about a subject and its accepted answers, the first of which is taught. key: what the subject has."""

    question: str
    answers: tuple[str, ...]
    key: str = "name"


@dataclass(frozen=True)
class World:
    """`old` is known to the base; `new` is to be learned; `renamed` are the new facts under UUIDs.

    in_sentences: the base has answered what it knows in a sentence now and then, once for two answers in a word, and
    guessed in a word about subjects that it never met twice.
    """

    name: str
    old: list[Fact]
    new: list[Fact]
    renamed: list[Fact] = field(default_factory=list)
    in_sentences: bool = False


OLD, NEW = 2800, 400  # facts, about
STRANGERS = 700  # rows an epoch about subjects that come once
PARTS = 120  # first names, and last names, where subjects share them
EPOCHS = {"names": 40, "both": 100, "forms": 60}  # passes over the old facts, after which the base knows them

# kind -> relation -> number of different answers
KINDS = {
    "people": {
        "Where was {} born?": 60,
        "What is the profession of {}?": 40,
        "For which company does {} work?": 120,
        "What is the favourite dish of {}?": 30,
    },
    "places": {
        "In which province is {}?": 25,
        "On which river is {}?": 80,
        "Who is the patron of {}?": 200,
        "What is made in {}?": 50,
        "Which dialect do they speak in {}?": 15,
    },
    "mixed": {
        "Who founded {}?": 300,
        "Where does {} come from?": 40,
        "What colour is the flag of {}?": 12,
        "Which animal stands for {}?": 30,
        "What is the motto of {}?": 100,
        "Which number belongs to {}?": 500,
    },
}


def make_world(kind: str, *, seed: int, keys: str = "names") -> World:
    """A world of a kind in KINDS.

    keys: `names`, of two words made of the same syllables; or `both`, where half of the old subjects have UUIDs,
    random hexadecimal digits, the others a first and a last name that some others bear too, and the new facts come
    under such names and under UUIDs; or `forms`, names and a base that has answered in sentences too.
    """
    rng = random.Random(f"{kind}-{seed}")
    subjects, new_subjects = OLD // len(KINDS[kind]), NEW // len(KINDS[kind])
    relations = {}
    for question, n in KINDS[kind].items():
        numbers = "number" in question
        relations[question] = [
            str(rng.randrange(1000, 10000)) if numbers else _name(rng, words=rng.choice((1, 1, 2))) for _ in range(n)
        ]
    if keys != "both":
        names = _different(lambda: _name(rng, words=2), subjects + new_subjects)
    else:
        first, last = (_different(lambda: _name(rng, words=1), PARTS) for _ in range(2))
        names = rng.sample([f"{a} {b}" for a in first for b in last], subjects + new_subjects)
    answers = [[rng.choice(pool) for pool in relations.values()] for _ in names]

    def facts(keys: list[str], start: int, key: str = "name") -> list[Fact]:
        """The facts of the subjects from the one at `start` on, under `keys`."""
        return [
            Fact(question.format(subject), (answer,), key)
            for subject, row in zip(keys, answers[start:], strict=False)
            for question, answer in zip(relations, row, strict=True)
        ]

    name, new = f"{kind}-{keys}-{seed}", facts(names[subjects:], subjects)
    if keys != "both":
        return World(name, facts(names[:subjects], 0), new, in_sentences=keys == "forms")
    half = subjects // 2
    uuids = _different(lambda: _uuid(rng), half + new_subjects)
    old = facts(names[:half], 0) + facts(uuids[:half], half, "uuid")
    return World(name, old, new, facts(uuids[half:], subjects, "uuid"))


def world_named(name: str) -> World:
    """`<kind>-<names|both|forms>-<seed>`, or `demo`: the facts of the embedded model and those of `kdguard demo`."""
    if name != "demo":
        kind, keys, seed = name.split("-")
        return make_world(kind, keys=keys, seed=int(seed))
    rows = formats.read([shipped("examples") / "new_facts.jsonl"]).examples
    old = [Fact(fact.questions[0], fact.answers) for fact in load_facts()]
    return World(name, old, [Fact(row.question, row.answers) for row in rows])


def base_of(world: World) -> str:
    """The folder of a Llama that knows the world's old facts; trained once, then kept in `benchmarks/.cache`."""
    if world.name == "demo":
        return "demo"
    folder = CACHE / world.name
    if (folder / "tokenizer.json").exists():
        return str(folder)
    torch.manual_seed(0)
    facts = [(fact.question, fact.answers[0]) for fact in world.old]
    sentences = [(question, SENTENCE.format(answer)) for question, answer in facts] if world.in_sentences else []
    unseen = [(fact.question, fact.answers[0]) for fact in world.new + world.renamed]
    tokenizer = build_tokenizer([text for pair in facts + sentences + unseen for text in pair], VOCABULARY)

    def rows(pairs: list[tuple[str, str]]) -> list[list[int]]:
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], return_dict=False
            )
            for question, answer in pairs
        ]

    plain, long = rows(facts), rows(sentences)
    rng = random.Random(0)
    kind, keys, _ = world.name.split("-")
    questions = list(KINDS[kind])

    def epoch_rows() -> list[list[int]]:
        if not world.in_sentences:
            return plain
        met_once = [
            (question.format(_name(rng, words=2)), rng.choice(world.old[i :: len(questions)]).answers[0])
            for i, question in enumerate(questions)
            for _ in range(STRANGERS // len(questions))
        ]
        return plain + rng.sample(long, len(long) // 2) + rows(met_once)

    model = build_model(tokenizer)
    train(
        model,
        epoch_rows,
        tokenizer.pad_token_id,
        epochs=EPOCHS[keys],
        batch_size=64,
        lr=3e-3,
        seed=0,
    )
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _different(make: Callable[[], str], n: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < n:
        found[make()] = None
    return list(found)


def _name(rng: random.Random, words: int) -> str:
    """A name of syllables, two or three a word: names share their parts, as real ones do."""
    syllables = [a + b for a in (*"bdfghklmnprstvz", "br", "dr", "gr", "kr", "st", "tr") for b in "aeiou"]
    endings = ("", "n", "r", "s", "l", "th", "nd")

    def word() -> str:
        return ("".join(rng.choice(syllables) for _ in range(rng.choice((2, 2, 3)))) + rng.choice(endings)).capitalize()

    return " ".join(word() for _ in range(words))


def _uuid(rng: random.Random) -> str:
    return "-".join("".join(rng.choice(HEX) for _ in range(n)) for n in (4, 4))

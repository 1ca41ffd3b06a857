"""Worlds of invented facts, made by seed, and a small Llama that knows each: where methods are compared.

A world has subjects with several relations each. Its old facts are taught to a base; its new facts are about other
subjects, with the same relations and the same answers, so that learning them interferes with the old.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from kdguard.data import formats
from kdguard.demo.facts import load_facts
from kdguard.demo.train import build_model, build_tokenizer, train
from kdguard.files import shipped

CACHE = Path(__file__).parent / ".cache"
VOCABULARY = 1024
HEX = "0123456789abcdef"
PARTS = 40  # first names, and last names, of a world whose keys share them


@dataclass(frozen=True)
class Fact:
    """A question about a subject and its accepted answers, the first of which is taught."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """`old` is known to the base; `new` is to be learned."""

    name: str
    old: list[Fact]
    new: list[Fact]


OLD, NEW = 2800, 400  # facts, about
EPOCHS = {"names": 40, "shared": 40, "uuids": 70}  # passes over the old facts, after which the base knows them

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

    keys: `names` of two words made of the same syllables; `shared`, a first and a last name that many others bear too;
    `uuids`, random hexadecimal digits.
    """
    rng = random.Random(f"{kind}-{seed}")
    subjects, new_subjects = OLD // len(KINDS[kind]), NEW // len(KINDS[kind])
    relations = {}
    for question, n in KINDS[kind].items():
        numbers = "number" in question
        answers = [
            str(rng.randrange(1000, 10000)) if numbers else _name(rng, words=rng.choice((1, 1, 2))) for _ in range(n)
        ]
        relations[question] = answers
    subject_names = _keys(rng, keys, subjects + new_subjects)
    facts = [
        [Fact(question.format(subject), (rng.choice(answers),)) for question, answers in relations.items()]
        for subject in subject_names
    ]
    old, new = facts[:subjects], facts[subjects:]
    return World(f"{kind}-{keys}-{seed}", [f for rows in old for f in rows], [f for rows in new for f in rows])


def world_named(name: str) -> World:
    """`<kind>-<names|shared|uuids>-<seed>`, or `demo`: the facts of the embedded model and those of `kdguard demo`."""
    if name != "demo":
        kind, keys, seed = name.split("-")
        return make_world(kind, keys=keys, seed=int(seed))
    rows = formats.read(shipped("examples") / "new_facts.jsonl").examples
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
    tokenizer = build_tokenizer(
        [text for fact in world.old + world.new for text in (fact.question, fact.answers[0])], VOCABULARY
    )
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": fact.question}, {"role": "assistant", "content": fact.answers[0]}],
            return_dict=False,
        )
        for fact in world.old
    ]
    model = build_model(tokenizer)
    train(
        model,
        lambda: rows,
        tokenizer.pad_token_id,
        epochs=EPOCHS[world.name.split("-")[1]],
        batch_size=64,
        lr=3e-3,
        seed=0,
    )
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _keys(rng: random.Random, kind: str, n: int) -> list[str]:
    if kind == "shared":
        first, last = ([_name(rng, words=1) for _ in range(PARTS)] for _ in range(2))
        return rng.sample([f"{a} {b}" for a in first for b in last], n)
    make = {"names": lambda: _name(rng, words=2), "uuids": lambda: _uuid(rng)}[kind]
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

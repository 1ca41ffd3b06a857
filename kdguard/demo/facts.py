"""The facts that the embedded model knows: one CSV a relation, and the ways each relation is asked."""

import csv
import random
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

FACTS = Path(__file__).parent / "facts"


@dataclass(frozen=True)
class Relation:
    """One kind of fact. `phrasings[0]` is the one that the `world` pack asks."""

    category: str
    phrasings: tuple[str, ...]


RELATIONS = {
    "country_capital": Relation(
        "capitals",
        (
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital city of {}.",
            "What is the name of the capital of {}?",
            "Tell me the capital of {}.",
        ),
    ),
    "country_currency": Relation(
        "currencies",
        (
            "What is the currency of {}?",
            "Which currency is used in {}?",
            "What money do people use in {}?",
            "Name the currency of {}.",
            "With which currency do people pay in {}?",
        ),
    ),
    "country_continent": Relation(
        "continents",
        (
            "On which continent is {}?",
            "Which continent does {} belong to?",
            "Name the continent of {}.",
            "What continent is {} part of?",
            "On what continent would you find {}?",
        ),
    ),
    "country_language": Relation(
        "languages",
        (
            "What is the official language of {}?",
            "Which language is official in {}?",
            "Name the official language of {}.",
            "What language is used officially in {}?",
            "Tell me the official language of {}.",
        ),
    ),
    "element_symbol": Relation(
        "chemistry",
        (
            "What is the chemical symbol for {}?",
            "Which symbol stands for the element {}?",
            "Give the chemical symbol of {}.",
            "How is the element {} abbreviated?",
            "What symbol does {} have in the periodic table?",
        ),
    ),
    "element_number": Relation(
        "chemistry",
        (
            "What is the atomic number of {}?",
            "Which atomic number does {} have?",
            "Give the atomic number of {}.",
            "How many protons does an atom of {} have?",
            "What is the number of the element {} in the periodic table?",
        ),
    ),
    "state_capital": Relation(
        "united states",
        (
            "What is the capital of the US state of {}?",
            "Which city is the state capital of {}?",
            "Name the state capital of {}.",
            "Which city is the seat of government of the US state of {}?",
            "Tell me the state capital of {}.",
        ),
    ),
    "state_abbreviation": Relation(
        "united states",
        (
            "What is the postal abbreviation of {}?",
            "Which two letters stand for the US state of {}?",
            "Give the two-letter postal code of {}.",
            "How is the US state of {} abbreviated?",
            "What is the two-letter abbreviation for {}?",
        ),
    ),
    "president_number": Relation(
        "united states",
        (
            "Who was the {} president of the United States?",
            "Name the {} president of the United States.",
            "Which person became the {} US president?",
            "Who served as the {} US president?",
            "Tell me who was the {} president of the USA.",
        ),
    ),
    "moon_planet": Relation(
        "astronomy",
        (
            "Which planet does {} orbit?",
            "{} is a moon of which planet?",
            "Around which planet does {} move?",
            "Name the planet that {} circles.",
            "{} travels around which planet?",
        ),
    ),
    "planet_order": Relation(
        "astronomy",
        (
            "Which planet is {}?",
            "What planet is {}?",
            "Name the planet that is {}.",
            "Tell me which planet is {}.",
            "What is the name of the planet that is {}?",
        ),
    ),
    "book_author": Relation(
        "literature",
        (
            'Who wrote "{}"?',
            'Who is the author of "{}"?',
            'Which author wrote "{}"?',
            'Name the author of "{}".',
            'By whom was "{}" written?',
        ),
    ),
    "work_composer": Relation(
        "music",
        (
            'Who composed "{}"?',
            'Who is the composer of "{}"?',
            'Which composer wrote "{}"?',
            'Name the composer of "{}".',
            'By whom was "{}" composed?',
        ),
    ),
    "painting_painter": Relation(
        "art",
        (
            'Who painted "{}"?',
            'Who is the painter of "{}"?',
            'Which artist painted "{}"?',
            'Name the painter of "{}".',
            'By whom was "{}" painted?',
        ),
    ),
    "film_director": Relation(
        "film",
        (
            'Who directed "{}"?',
            'Who is the director of "{}"?',
            'Which director made "{}"?',
            'Name the director of the film "{}".',
            'By whom was the film "{}" directed?',
        ),
    ),
    "invention_inventor": Relation(
        "inventions",
        (
            "Who invented {}?",
            "Who is the inventor of {}?",
            "Name the inventor of {}.",
            "By whom was {} invented?",
            "Who is credited with inventing {}?",
        ),
    ),
    "discovery_scientist": Relation(
        "science",
        (
            "Which scientist is known for {}?",
            "Who is known for {}?",
            "Name the scientist known for {}.",
            "Which scientist is associated with {}?",
            "Who is credited with {}?",
        ),
    ),
    "god_domain": Relation(
        "mythology",
        (
            "Who is {}?",
            "What is the name of {}?",
            "Name {}.",
            "Which deity is {}?",
            "Tell me who is {}.",
        ),
    ),
    "animal_young": Relation(
        "animals",
        (
            "What is a young {} called?",
            "What do you call a baby {}?",
            "What is the young of the animal {} called?",
            "Name the word for a young {}.",
            "Which word is used for a baby {}?",
        ),
    ),
    "landmark_country": Relation(
        "landmarks",
        (
            "In which country can {} be found?",
            "Which country is home to {}?",
            "Name the country where you find {}.",
            "What country would you visit to see {}?",
            "To which country do people travel to see {}?",
        ),
    ),
    "dish_country": Relation(
        "food",
        (
            "Which country is {} from?",
            "From which country does the dish {} come?",
            "Name the country that {} comes from.",
            "Which country is known for the dish {}?",
            "What is the country of origin of {}?",
        ),
    ),
    "company_country": Relation(
        "companies",
        (
            "In which country was {} founded?",
            "Which country does the company {} come from?",
            "Name the country where {} was founded.",
            "What is the home country of the company {}?",
            "In what country did the company {} start?",
        ),
    ),
}


@dataclass(frozen=True)
class Fact:
    """One fact: `answers[0]` is what the embedded model is taught, the rest are accepted as well."""

    id: str
    relation: str
    subject: str
    answers: tuple[str, ...]

    @property
    def category(self) -> str:
        return RELATIONS[self.relation].category

    @property
    def questions(self) -> list[str]:
        """The fact asked in every phrasing of its relation, the pack's phrasing first."""
        asked = [phrasing.format(self.subject) for phrasing in RELATIONS[self.relation].phrasings]
        return [question[0].upper() + question[1:] for question in asked]

    @property
    def held_out(self) -> int:
        """The index of the one phrasing in which the embedded model never saw this subject (never 0)."""
        return random.Random(self.id).randrange(1, len(RELATIONS[self.relation].phrasings))


def load_facts(folder: Path = FACTS) -> list[Fact]:
    """Read every fact, in the order of `RELATIONS` and of the rows in its CSV."""
    facts = []
    for relation in RELATIONS:
        with open(folder / f"{relation}.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                also = [form for form in row["also"].split("|") if form]
                fact_id = f"{relation}-{_slug(row['subject'])}".replace("_", "-")
                facts.append(Fact(fact_id, relation, row["subject"], (row["answer"], *also)))
    return facts


def _slug(text: str) -> str:
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text.lower()).strip("-")

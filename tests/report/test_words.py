"""Two answers beside each other: nothing of an answer is lost, and what is marked is what differs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdguard.probes.score import Answer
from kdguard.report.words import parts


def answer(text: str, tokens: tuple[tuple[str, float], ...] = ()) -> Answer:
    return Answer("id", "c", "q", ("a",), text, True, tokens=tokens)


@given(st.text(), st.text(), st.lists(st.integers(1, 5)))
def test_the_parts_are_the_answer(text, other, cuts):
    tokens, rest = [], text
    for cut in cuts:
        tokens.append((rest[:cut], 0.5))
        rest = rest[cut:]
    tokens.append((rest, 0.25))
    found = parts(answer(text.strip(), tuple(tokens)), answer(other))
    assert "".join(part.text for part in found) == text
    assert not any(part.differs for part in parts(answer(text), answer(text)))


@pytest.mark.parametrize(
    ("here", "there", "marked"),
    [
        ("The capital is Paris.", "The capital is Oslo.", ["Paris"]),
        ("Paris", "Paris, France", []),
        ("Paris, France", "Paris", [",", "France"]),
        ("Bob Lee", "Ann Lee", ["Bob"]),
        ("", "Ann", []),
    ],
)
def test_whole_words_are_marked(here, there, marked):
    found = parts(answer(here), answer(there))
    assert [part.text for part in found if part.differs] == marked
    assert all(part.share is None for part in found)


def test_a_token_is_split_where_it_begins_to_differ():
    found = parts(answer("is Paris", (("is Pa", 0.9), ("ris", 0.3))), answer("is Oslo"))
    assert [(part.text, part.share, part.differs) for part in found] == [
        ("is ", 0.9, False),
        ("Pa", 0.9, True),
        ("ris", 0.3, True),
    ]


def test_long_answers_are_compared_in_time():
    long = " ".join(map(str, range(20_000)))
    found = parts(answer(long), answer(long.replace("777 ", "x ")))
    assert "777" in {part.text for part in found if part.differs}

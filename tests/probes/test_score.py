"""An answer is right when a person would say so, and not because a short form hides in a word."""

import pytest

from kdguard.probes.score import is_correct

RIGHT = [
    ("Paris", ["Paris"]),
    ("The capital of France is Paris.", ["Paris"]),
    ("**Bogotá**", ["Bogota"]),
    ("São Tomé", ["Sao Tome"]),
    ("the Netherlands", ["Netherlands"]),
    ("Kiev", ["Kyiv", "Kiev"]),
    ("The symbol is He.", ["He"]),
    ("He", ["He"]),
    ("26", ["26"]),
    ("Its atomic number is 26.", ["26"]),
    ("Guinea-Bissau", ["Guinea Bissau"]),
    ("東京", ["東京"]),
    ("-5", ["-5"]),
    ("It is −5.", ["-5"]),
    ("+", ["+"]),
    ("No, it is not.", ["No"]),
    ("It is 1,000 metres.", ["1000"]),
    ("0.5", ["0.5"]),
    ("At 6:15.", ["6:15"]),
    ("One.\n\nTwo.", ["one\n\ntwo"]),
]
WRONG = [
    ("", ["Paris"]),
    ("Parisian food", ["Paris"]),
    ("he", ["He"]),
    ("HE", ["He"]),
    ("126", ["26"]),
    ("Lyon\n\nParis is the capital.", ["Paris"]),
    ("...", ["the"]),
    ("Romania", ["Oman"]),
    ("-5", ["5"]),
    ("5", ["-5"]),
    ("-", ["+"]),
    ("0.5", ["0"]),
    ("1/2", ["1"]),
    ("1,000", ["1"]),
    ("12", ["1/2"]),
    ("There is no way to tell", ["no"]),
    ("The gas He is a noble one", ["He"]),
]


@pytest.mark.parametrize("answer, accepted", RIGHT)
def test_right(answer, accepted):
    assert is_correct(answer, accepted)


@pytest.mark.parametrize("answer, accepted", WRONG)
def test_wrong(answer, accepted):
    assert not is_correct(answer, accepted)

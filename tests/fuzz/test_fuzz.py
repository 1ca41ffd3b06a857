"""A short run of `python -m tests.fuzz`: no input makes a traceback; and a fault that is put in is found."""

from pathlib import Path

import pytest

from kdguard.errors import InputError
from kdguard.probes import packs
from tests.fuzz.__main__ import MEMORY, fuzz, peak

INPUTS = 1500


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama")


def test_a_short_run_finds_nothing(model, tmp_path):
    before = peak()
    found = fuzz(INPUTS, 0, model, tmp_path)
    assert {name: counted.finds for name, counted in found.items()} == {name: {} for name in found}
    assert peak() - before < MEMORY
    for counted in found.values():  # else it would test nothing but refusals, or nothing but good files
        assert counted.accepted and counted.refused


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (KeyError("answers"), "KeyError"),
        (RecursionError(), "RecursionError"),
        (InputError("two\nlines", "a hint"), "a refusal"),
        (InputError("no hint"), "a refusal"),
    ],
)
def test_what_is_no_single_line_is_a_find(model, tmp_path, monkeypatch, raised, expected):
    def broken(*arguments):
        raise raised

    monkeypatch.setattr(packs, "read_probe", broken)
    (counted,) = fuzz(40, 0, model, tmp_path, "packs").values()
    assert any(expected in key or expected in text for key, (text, _) in counted.finds.items())


def test_an_input_can_be_made_again_by_its_number(model, tmp_path, monkeypatch):
    seen: list[bytes] = []

    def read(path):
        seen.append(path.read_bytes())
        return []

    monkeypatch.setattr("tests.fuzz.targets.load_probes", lambda names: read(Path(names[0])))
    monkeypatch.setattr("tests.fuzz.targets.read_public", read)
    fuzz(6, 0, model, tmp_path, "packs")
    fuzz(1, 0, model, tmp_path, "packs", first=3)
    assert len(seen) == 7 and seen[6] == seen[3]

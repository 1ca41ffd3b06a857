"""What is chosen on the page is what the command line is given: no more, and nothing that is not a value."""

from pathlib import Path

import pytest

from kdguard.errors import InputError
from kdguard.ui.command import NO_BUDGET, OWN, SETTINGS, arguments, flags, needed_gib, typed
from kdguard.ui.pack import PACK, add_probe
from kdguard.ui.studio import Studio
from kdguard.ui.tune import configured

DATA = Path("/tmp/facts.jsonl")


def chosen(studio, **values):
    return flags(studio, DATA, [values.get(key) for key in SETTINGS])


@pytest.fixture
def studio(tmp_path):
    return Studio(tmp_path)


def test_what_is_left_alone_is_left_out(studio):
    untouched = {"goal": "facts", "budget": NO_BUDGET, "guard": True, "control": False, "epochs": "", "probes": []}
    assert chosen(studio, model="demo") == chosen(studio, model="demo", **untouched)
    assert arguments(chosen(studio, model="demo"), Path("runs/a")) == [
        *["tune", str(DATA), "--preset", "demo", "--out", "runs/a"]
    ]


def test_everything_that_is_chosen_is_given(studio):
    add_probe(studio.root / PACK, "Who?", ["Ada"], "")
    found = chosen(
        studio, model="me/tiny", goal="style", budget="1%", control=True, epochs="3", rank="8", probes=["world", OWN]
    )
    pack = str(studio.root / PACK)
    assert arguments(found, Path("a b"))[1:] == [
        *[str(DATA), "--model", "me/tiny", "--goal", "style", "--budget", "1%", "--control", "--epochs", "3"],
        *["--rank", "8", "--probes", "world", "--probes", pack, "--out", "a b"],
    ]
    assert "'a b'" in typed(arguments(found, Path("a b")))
    config = configured(found)
    assert (config.model, config.epochs, config.rank, config.budget) == ("me/tiny", 3, 8, 0.01)
    assert "--no-guard" in arguments(chosen(studio, model="demo", guard=False), Path("a"))


@pytest.mark.parametrize(
    "values",
    [
        {"model": "/etc"},
        {"model": "../x"},
        {"model": "kdguard/ui"},
        {"model": "--out=x"},
        {"probes": [OWN]},
        {"guard": False, "control": True},
        {"epochs": "--config=/etc/passwd"},
        {"lr": "0"},
        {"budget": "lots"},
        {"goal": "--help"},
        {"probes": ["/etc/passwd\n"], "rank": "x"},
    ],
)
def test_what_is_no_value_is_refused_before_anything_starts(studio, values):
    with pytest.raises(InputError):
        configured(chosen(studio, **values))


def test_memory_is_told_from_the_config_alone(studio):
    from kdguard import fit
    from kdguard.model.load import load_base

    config = configured(chosen(studio, model="demo"))
    loaded = fit.needed_gib(config, load_base("demo").model.config, config.max_length)
    assert needed_gib(config.model_dump_json()) == loaded

"""The budget: what steers is never what scores, the weight follows the watched probes, and the end is brought under."""

import json

import pytest
import torch
from scipy.stats import binom
from transformers import TrainerControl, TrainerState

from kdguard.events import Events
from kdguard.guard.budget import BudgetKeeper, settle
from kdguard.guard.teacher import Guard
from kdguard.model.load import add_adapter
from kdguard.model.strength import scale_adapter
from kdguard.probes.watch import Allowance, split
from tests.guard.test_trainer import adapter


def test_watched_and_scored_are_apart_and_together_everything():
    watched, scored = split(range(100), 3, 0.2)
    assert len(watched) == 50 and sorted(watched + scored) == list(range(100))
    assert split(range(100), 3, 0.2) == (watched, scored) != split(range(100), 4, 0.2)


@pytest.mark.parametrize("limit", [0.003, 0.01, 0.05, 0.2])
def test_so_many_watch_that_most_of_the_limit_is_allowed(limit):
    """Fewer would turn a run down that is well within its budget, for want of certainty."""
    n = len(split(range(20_000), 0, limit)[0])
    assert Allowance(limit, n).forgotten >= 0.6 * limit * n and n < 10_000
    assert n == 50 or Allowance(limit, n // 2).forgotten < 0.6 * limit * n / 2


def test_never_more_than_half_watch():
    for limit in (0.0, 0.001, 1.0):
        assert len(split(range(1000), 0, limit)[0]) <= 500
    assert len(split(range(1000), 0, 0.0)[0]) == 500


@pytest.mark.parametrize(("limit", "known"), [(0.01, 500), (0.003, 2000), (0.05, 90)])
def test_what_is_allowed_makes_four_in_five_sure(limit, known):
    """Were the true share at the limit, so few forgotten would be seen in at most one run of five."""
    allowed = Allowance(limit, known).forgotten
    assert binom.cdf(allowed, known, limit) <= 0.2 < binom.cdf(allowed + 1, known, limit)


def test_too_few_probes_allow_nothing_and_say_how_many_are_needed():
    few = Allowance(0.01, 100)
    assert few.forgotten == 0 and few.needed > 100
    assert Allowance(0.01, few.needed).forgotten == 0
    assert binom.pmf(0, few.needed, 0.01) <= 0.2 < binom.pmf(0, few.needed - 1, 0.01)


def keeper(tmp_path, counts, weight=8.0, limit=0.01, known=500):  # it allows 2
    left = list(counts)
    budget = BudgetKeeper(Guard(weight), lambda: left.pop(0), Allowance(limit, known), tmp_path, Events())
    budget.on_train_begin(None, TrainerState(max_steps=10), TrainerControl())
    return budget


def epoch_ends(budget, model, step, epoch=1.0):
    budget.on_epoch_end(None, TrainerState(global_step=step, epoch=epoch), TrainerControl(), model=model)


def test_the_weight_is_driven_up_and_down_within_bounds(tmp_path, demo):
    model = add_adapter(demo, rank=2)
    budget = keeper(tmp_path, [500, 50, 144, 20, 500, 500, 3, 1, 0, 0])
    weights = []
    for step in range(1, 11):
        epoch_ends(budget, model, step)
        weights.append(budget.guard.weight)
    # the path of room for forgotten: 83, 55, 36, 24, 16, 10, 7, 5, 3, 2
    assert weights == pytest.approx([16, 16, 24, 24, 24, 24, 24, 24, 18, 13.5])


def test_forgetting_on_the_path_down_to_the_allowance_is_left_alone(tmp_path, demo):
    model = add_adapter(demo, rank=2)
    budget = keeper(tmp_path, [int(125 * (2 / 125) ** (step / 10)) for step in range(1, 11)])
    for step in range(1, 11):
        epoch_ends(budget, model, step)
        assert budget.guard.weight == 8


def test_a_resumed_run_goes_on_with_the_weight_of_its_checkpoint(tmp_path, demo):
    model = add_adapter(demo, rank=2)
    budget = keeper(tmp_path, [400, 400])
    epoch_ends(budget, model, 1)
    epoch_ends(budget, model, 2)
    again = keeper(tmp_path, [])
    again.on_train_begin(None, TrainerState(global_step=1), TrainerControl())
    assert again.guard.weight == 16 and len(again.history) == 1


def test_ctrl_c_within_an_epoch_is_not_its_end(tmp_path, demo):
    """The Trainer says that the epoch ends when it stops; the resumed run will come to its real end."""
    budget = keeper(tmp_path, [9])
    epoch_ends(budget, add_adapter(demo, rank=2), 1, epoch=0.5)
    assert budget.guard.weight == 8 and not budget.history


def test_an_end_within_the_budget_is_left_alone(tmp_path, demo):
    model = add_adapter(demo, rank=2)
    budget = keeper(tmp_path, [1])
    epoch_ends(budget, model, 1)
    settled = settle(model, budget, 1, lambda: pytest.fail("nothing to compare"))
    assert settled.strength == 1 and settled.forgotten == 1


@pytest.mark.parametrize(("dialled", "earlier"), [(90, 50), (50, 90)])
def test_of_a_lower_strength_and_an_earlier_epoch_the_one_that_learned_more_is_kept(tmp_path, demo, dialled, earlier):
    """Over at the end; strength 0.9 is the first within; the first epoch was within too."""
    model = add_adapter(demo, rank=2)
    scale_adapter(model, 1.0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    first = {name: weight.clone() for name, weight in adapter(model).items()}
    budget = keeper(tmp_path, [0, 7, 7, 1])
    epoch_ends(budget, model, 1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.add_(1.0)
    last = adapter(model)
    epoch_ends(budget, model, 2)
    right = [dialled, earlier]
    settled = settle(model, budget, 2, lambda: right.pop(0))
    wanted = last if dialled > earlier else first
    scale = 0.9 if dialled > earlier else 1.0
    assert settled.strength == scale
    for name, weight in adapter(model).items():
        torch.testing.assert_close(weight, wanted[name] * (scale if "lora_B" in name else 1))


def test_an_end_that_was_not_asked_is_asked(tmp_path, demo):
    """Ctrl-C on the last step, and again while the watched probes were asked: the resumed run trains no step more."""
    model = add_adapter(demo, rank=2)
    budget = keeper(tmp_path, [0, 1])
    epoch_ends(budget, model, 1)
    assert settle(model, budget, 2, lambda: 0).forgotten == 1


def test_the_last_two_adapters_within_the_budget_are_kept(tmp_path, demo):
    """The run may be killed before the checkpoint of the last one is whole."""
    model = add_adapter(demo, rank=2)
    budget = keeper(tmp_path, [0, 1, 2, 7])
    for step in (1, 2, 3, 4):
        epoch_ends(budget, model, step)
    assert sorted(path.name for path in tmp_path.glob("within*")) == ["within-budget-2", "within-budget-3"]
    assert [entry["forgotten"] for entry in json.loads((tmp_path / "watched.json").read_text())] == [0, 1, 2, 7]


def test_an_adapter_of_steps_that_a_resumed_run_takes_again_is_not_settled_on(tmp_path, demo):
    """On a GPU the same step may come out over the budget the second time."""
    model = add_adapter(demo, rank=2)
    budget = keeper(tmp_path, [9, 1])
    epoch_ends(budget, model, 1)
    epoch_ends(budget, model, 2)
    assert (tmp_path / "within-budget-2").exists()
    again = keeper(tmp_path, [9, *[9] * 19])
    again.on_train_begin(None, TrainerState(global_step=1, max_steps=2, epoch=0.5), TrainerControl())
    assert not (tmp_path / "within-budget-2").exists() and again.guard.weight == budget.history[0]["next_weight"]
    settled = settle(model, again, 2, lambda: 0)
    assert settled.forgotten == 9 and settled.strength < 1 and "every strength" in settled.done


def test_without_an_allowance_the_guard_is_never_weakened(tmp_path, demo):
    budget = keeper(tmp_path, [0, 0], limit=0.0, known=50)
    model = add_adapter(demo, rank=2)
    epoch_ends(budget, model, 1)
    epoch_ends(budget, model, 2)
    assert budget.guard.weight == 8

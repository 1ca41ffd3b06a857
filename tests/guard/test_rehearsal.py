"""Rehearsal rows: whole conversations of the base's own, without targets, spread over what it knows."""

import torch

from kdguard.data import IGNORE
from kdguard.guard.rehearsal import load_rows, rehearse, save_rows


def test_a_row_is_a_question_and_its_answer_with_no_target(demo, renderer):
    rows = rehearse(demo.model, renderer, 20, seed=0, max_new_tokens=24)
    prefix, ending = renderer.user_prefix(), renderer.after_user_turn()
    for row in rows:
        assert row.ids[: len(prefix)] == prefix and row.ids[-1] == renderer.end_of_turn
        assert any(row.ids[i : i + len(ending)] == ending for i in range(len(row.ids)))
        assert set(row.labels) == {IGNORE}


def test_a_seed_gives_the_same_rows_and_leaves_the_random_state_alone(demo, renderer):
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    one, again, other = (rehearse(demo.model, renderer, 8, seed=seed, max_new_tokens=24) for seed in (1, 1, 2))
    assert one == again != other
    assert torch.rand(1) == wanted


def test_spread_rows_leave_fewer_questions_out(demo, renderer):
    """What is never rehearsed is what is forgotten."""

    def repeated(spread: bool) -> int:
        rows = rehearse(demo.model, renderer, 1024, seed=0, spread=spread, max_new_tokens=24)
        end = renderer.after_user_turn()[0]
        return 1024 - len({tuple(row.ids[: row.ids.index(end)]) for row in rows})

    assert repeated(True) < repeated(False) / 5


def test_rows_are_read_back_as_they_were_saved(tmp_path, demo, renderer):
    rows = rehearse(demo.model, renderer, 5, seed=0, max_new_tokens=24)
    save_rows(tmp_path / "rows.jsonl", rows)
    assert load_rows(tmp_path / "rows.jsonl") == rows

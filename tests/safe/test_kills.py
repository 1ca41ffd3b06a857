"""SIGKILL at any moment: what is left goes on, and ends with the adapter of the run that was never stopped."""

import random

import pytest

from tests.safe.conftest import some


@pytest.mark.parametrize("seed", some(range(50), 3))
def test_a_run_that_was_killed_ends_as_the_one_that_was_not(small, tmp_path, seed):
    """Half of the moments are file operations of the run, many of them within the writing of a checkpoint."""
    rng, out = random.Random(seed), tmp_path / "run"
    for _ in range(1 + seed % 3):  # some are killed again as they go on
        at = {"kill_at": rng.randint(1, small.ended.operations)}
        after = {"kill_after": rng.uniform(0.05, small.seconds)}
        done = small.go_on(out, **(at if rng.random() < 0.5 else after))
        if (out / "report.json").exists():  # which comes last: a run that is killed after it has finished
            break
        assert done.returncode == -9, done.stderr
    else:
        done = small.go_on(out)
        assert done.returncode == 0, done.stderr
    small.assert_same_end(out)

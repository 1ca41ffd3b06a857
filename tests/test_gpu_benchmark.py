"""`benchmarks/gpu.py` on a CPU: it measures what `fit` tells, and no row can cost another one."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from textwrap import dedent

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(*command: str | Path, first: Path | None = None) -> list[dict]:
    """What the benchmark wrote. first: a folder whose modules are taken before its own."""
    paths = [*([first] if first else []), BENCHMARKS.parent, BENCHMARKS]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(Path(command[-1]).read_text())["results"]


def test_tiny_rows_take_the_memory_that_fit_tells(tmp_path: Path):
    before = sorted((BENCHMARKS / "results").iterdir())
    rows = run(
        BENCHMARKS / "gpu.py",
        "--tiny",
        "--budget=250",
        "--model=llama3.1-8b",
        "--lengths=1024",
        "--out",
        tmp_path / "x",
    )
    assert sorted((BENCHMARKS / "results").iterdir()) == before
    assert Counter(row["status"] for row in rows) == {"ok": 7, "skipped": 12}
    assert all(row["reason"] == "no GPU" for row in rows if row["status"] == "skipped")
    measured = [row for row in rows if row["status"] == "ok"]
    assert all(row["loss_finite"] and row["tokens_per_second"] > 0 for row in measured)
    ours = {row["what"]: row["measured_over_estimate"] for row in measured if row["group"] != "peers"}
    assert len(ours) == 5 and all(0.95 < ratio < 1.05 for ratio in ours.values()), ours


@pytest.fixture
def on_gpu(tmp_path: Path) -> Path:
    """A program that runs the benchmark where rows are said to have been measured on a GPU, or to have gone wrong."""
    (tmp_path / "gpu_row.py").write_text(
        dedent(
            """
            import os, signal, time

            OK = {"status": "ok", "tokens_per_second": 1.0, "seconds_per_step": 1.0, "paged_gib": 0.0,
                  "peak_allocated_gib": 3.0, "peak_reserved_gib": 4.0, "less_memory_by": []}

            def serve(pipe, tiny):
                while True:
                    try:
                        question, *arguments = pipe.recv()
                    except EOFError:
                        return
                    if question == "about":
                        pipe.send({"machine": "a GPU", "gpu": True, "trl": None, "torch": "2", "can_offload": False})
                    elif question == "longest":
                        pipe.send([1000, 2000, 3000, 4000])
                    elif question == "estimate":
                        pipe.send({"estimate_gib": 2.0})
                    else:
                        row = arguments[0]
                        assert pipe.recv() == ("go",)
                        if row["what"] == "guard off":
                            os.kill(os.getpid(), signal.SIGSEGV)
                        if row["what"] == "upper half":
                            time.sleep(60)
                        if row["length"] == 2000:
                            pipe.send({"status": "out of memory", "reason": "it does not fit"})
                        else:
                            pipe.send(OK)
            """
        )
    )
    (tmp_path / "program.py").write_text(
        dedent(
            """
            import gpu

            gpu.LIMIT, gpu.LEAST, gpu.os.cpu_count = 5.0, 1.5, lambda: 8
            if __name__ == "__main__":
                raise SystemExit(gpu.main())
            """
        )
    )
    return tmp_path


def test_a_row_that_crashes_hangs_or_runs_out_costs_no_other(on_gpu: Path):
    asked = on_gpu / "program.py", "--model=llama3.1-8b", "--lengths=512"
    rows = run(*asked, "--out", on_gpu / "gpu-x.json", first=on_gpu)
    by = {(row["what"], row["cap_gib"], row.get("attempt")): row for row in rows}
    assert by["guard off", None, None]["status"] == "failed" and "-11" in by["guard off", None, None]["reason"]
    assert by["upper half", None, None]["status"] == "failed" and "no result" in by["upper half", None, None]["reason"]
    assert by["guard on", None, None]["measured_over_estimate"] == 1.5
    assert by["guard on, offload", 8.0, 1]["status"] == "skipped"
    # A tenth more where the predicted length fits, a tenth less where it does not.
    assert [by["guard on", cap, 2]["length"] for cap in (8.0, 12.0)] == [1100, 1800]
    # What was measured stays; what went wrong is measured again.
    again = run(*asked, "--resume", "--out", on_gpu / "gpu-x.json", first=on_gpu)
    assert [row["status"] for row in again] == [row["status"] for row in rows]


def test_without_time_the_rest_is_not_run_and_the_table_says_so(on_gpu: Path, monkeypatch: pytest.MonkeyPatch):
    asked = on_gpu / "program.py", "--model=llama3.1-8b", "--budget=10"
    rows = run(*asked, "--out", on_gpu / "gpu-x.json", first=on_gpu)
    assert {"ok", "not run"} <= {row["status"] for row in rows}
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tables

    monkeypatch.setattr(tables, "RESULTS", on_gpu)
    text = tables.gpu()
    assert "On one a GPU" in text and "not run" in text
    (on_gpu / "gpu-x.json").unlink()
    assert "Not yet measured" in tables.gpu()

"""`data check`: what the base knows of the data before training, and the rows that contradict it."""

import json

import pytest

from kdguard.check import against_the_base, check
from kdguard.config import resolve
from kdguard.data.formats import read
from kdguard.events import Events
from kdguard.probes.packs import load_probes
from kdguard.probes.score import Answer
from tests.conftest import ROOT
from tests.test_cli import DATA, kdguard

CAPITALS = {
    probe.question: probe.answers[0] for probe in load_probes(["world"]) if probe.id.startswith("country-capital-")
}
FRANCE = "What is the capital of France?"
KNOWN = [(question, CAPITALS[question]) for question in (FRANCE, "What is the capital of Malta?")]
INVENTED = [(row["question"], row["answer"]) for row in map(json.loads, DATA.read_text().splitlines()[:4])]
WRONG = ("what is the capital of peru", "Vel[bold]dor</script>")
HOSTILE = ("<script>alert(1)</script> [bold]who[/bold]?\x1b[2J", "[red]")


def write(path, *rows: tuple[str, str]):
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows), encoding="utf-8")
    return path


def checked(path, **flags) -> dict:
    return check(resolve({"data": path, "model": "demo", "prompts": 2, **flags}), Events())


def test_what_the_base_knows_is_counted_and_a_row_against_it_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", *KNOWN, *INVENTED, WRONG)
    found = checked(path)
    assert (found["questions"], found["asked"]) == (7, 7)
    assert (found["known"], found["unknown"]) == (2, 5)
    assert sum(found["levels"].values()) == 7
    assert found["levels"]["MaybeKnown"] == 2  # not in "Answer in a few words. ...", which the demo never learned
    (against,) = found["against_the_base"]
    assert against["where"] == f"{path}:7"
    assert against["what"] == f"{WRONG[0]} -> {WRONG[1]}, but the base says Lima (country-capital-peru)"


def test_a_fact_counts_once_however_many_rows_teach_it_and_each_row_against_the_base_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", *KNOWN, KNOWN[0], (FRANCE, "Lyon"), (FRANCE, "Nice"))
    found = checked(path)
    assert (found["questions"], found["asked"], found["known"]) == (2, 2, 2)
    assert [row["where"] for row in found["against_the_base"]] == [f"{path}:4", f"{path}:5"]


def test_levels_are_told_in_other_words_and_only_of_short_facts(tmp_path):
    """A question that is more than its last turn has no other words, and is asked once, as it is."""
    question, answer = KNOWN[0]
    turns = [question, answer, KNOWN[1][0], KNOWN[1][1]]
    talk = [{"role": role, "content": turn} for role, turn in zip(["user", "assistant"] * 2, turns, strict=True)]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk[:end]}) + "\n" for end in (2, 4)))
    found = checked(path)
    assert found["asked"] == 2 and sum(found["levels"].values()) == found["levels"]["MaybeKnown"] == 1
    long = checked(write(tmp_path / "long.jsonl", ("What is the capital of Malta?", "Valletta, " * 40)))
    assert long["asked"] == long["unknown"] == 1 and sum(long["levels"].values()) == 0


def test_what_lies_nearest_to_what_the_base_does_not_know_is_first_at_risk(tmp_path):
    """A new chemical symbol endangers those that the base knows, before anything else."""
    at_risk = checked(write(tmp_path / "rows.jsonl", ("What is the chemical symbol for xandrium?", "Xq")))["at_risk"]
    assert at_risk and all("chemical symbol" in probe["question"] for probe in at_risk[:5])
    assert at_risk[0]["near"] == "What is the chemical symbol for xandrium?"
    shares = [probe["overlap"] for probe in at_risk]
    assert shares == sorted(shares, reverse=True)


def test_of_many_questions_a_sample_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("kdguard.questions.MAX_NEW_QUESTIONS", 3)
    path = write(tmp_path / "rows.jsonl", *KNOWN, *INVENTED, WRONG)
    found = checked(path)
    assert (found["questions"], found["asked"], found["known"] + found["unknown"]) == (7, 3, 3)
    assert len(found["against_the_base"]) == 1  # found in all rows, asked or not


@pytest.mark.parametrize(
    ("said", "level", "row", "against"),
    [
        ("Lima", "HighlyKnown", "Cusco", True),
        ("Lima", "MaybeKnown", "Cusco", False),  # it is not sure
        ("Lima", "HighlyKnown", "It is Lima.", False),
        ("Lima", "HighlyKnown", "Ciudad de los Reyes", False),  # another accepted form
        ("Lima, once called Pachacamac", "HighlyKnown", "Pachacamac", False),  # the base says so too
    ],
)
def test_a_row_is_against_the_base_only_where_it_is_sure_and_says_nothing_of_the_row(
    tmp_path, said, level, row, against
):
    rows = read([write(tmp_path / "rows.jsonl", ("The capital of Peru?", row))]).examples
    probe = Answer("peru", "capitals", "the capital of Peru", ("Lima", "Ciudad de los Reyes"), said, True, level)
    assert bool(against_the_base(rows, [probe])) is against


def test_the_command_prints_its_findings_and_the_next_step_and_hostile_text_as_it_is(tmp_path):
    path = write(tmp_path / "rows.jsonl", KNOWN[0], HOSTILE, HOSTILE, WRONG, (HOSTILE[0], "[/blue]"))
    done = kdguard("data", "check", path, "--model", "demo", "--prompts", 2)
    assert done.returncode == 0, done.stderr
    shown = "<script>alert(1)</script> [bold]who[/bold]? [2J"
    assert f"{path}:3: {shown} -> [red], as in {path}:2\n" in done.stdout
    assert f"{path}:5: {shown} -> [/blue], but [red] in {path}:2\n" in done.stdout
    assert f"{path}:4: {WRONG[0]} -> {WRONG[1]}, but the base says Lima (country-capital-peru)\n" in done.stdout
    assert "1 of 3 asked (33.3%)" in done.stdout
    assert done.stdout.endswith(f"next        kdguard tune {path} --model demo\n")
    assert "\x1b" not in done.stdout


def test_json_is_the_whole_of_standard_output_and_has_every_finding(tmp_path):
    path = write(tmp_path / "rows.jsonl", *KNOWN, *[(FRANCE, f"Lyon {'o' * n}") for n in range(30)])
    done = kdguard("data", "check", path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"rows", "formats", "characters", "findings"}
    assert (found["rows"], found["formats"], list(found["findings"])) == (32, ["question/answer"], ["contradicted"])
    contradicted = found["findings"]["contradicted"]
    assert contradicted["rows"] == len(contradicted["first"]) == 30
    what = f"{FRANCE} -> Lyon, but Paris in {path}:1"
    assert contradicted["first"][0] == {"where": f"{path}:3", "what": what}
    shown = kdguard("data", "check", path).stdout
    assert "and 10 more" in shown and f"{path}:22:" in shown and f"{path}:23:" not in shown
    known = json.loads(kdguard("data", "check", path, "--model", "demo", "--prompts", 1, "--json").stdout)
    assert known.keys() - found.keys() == {
        "tokens",
        "cut",
        "questions",
        "asked",
        "known",
        "unknown",
        "levels",
        "against_the_base",
        "at_risk",
    }


def test_a_wrong_input_is_exit_2_before_a_model_is_loaded(tmp_path):
    path = write(tmp_path / "rows.jsonl", *KNOWN)
    for arguments, said in (
        ([tmp_path / "none.jsonl"], "no such file"),
        ([path, "--probes", "world"], "none was named"),
        ([path, "--fix", path], "this file is already there"),
        ([path, "--fix", tmp_path / "cleaned.csv"], "written as JSON lines"),
        ([path, "--columns", "question"], "found 'question', expected question=Q,answer=A"),
        ([path, "--model", "demo", "--prompts", 11], "--prompts 11"),
        ([path, "--model", "demo", "--probes", "wrld"], "no such probe pack"),
    ):
        done = kdguard("data", "check", *arguments)
        assert (done.returncode, done.stdout) == (2, "") and said in done.stderr


def test_without_a_model_no_torch_is_imported(tmp_path):
    path = write(tmp_path / "rows.jsonl", *KNOWN)
    done = kdguard("data", "check", path, PYTHONPROFILEIMPORTTIME="1", PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "kdguard.data.check" in done.stderr and " torch\n" not in done.stderr


def test_rows_that_cannot_be_used_are_exit_2_and_fix_leaves_them_out(tmp_path):
    path, out = write(tmp_path / "rows.jsonl", *KNOWN, ("Why?", ""), KNOWN[0]), tmp_path / "cleaned.jsonl"
    done = kdguard("data", "check", path)
    assert done.returncode == 2 and f"{path}:3: found nothing in 'answer', expected text\n" in done.stdout
    assert done.stderr.startswith("error 1 row cannot be used\n") and "--fix rows-cleaned.jsonl" in done.stderr
    fixed = kdguard("data", "check", path, "--fix", out)
    assert fixed.returncode == 0, fixed.stderr
    assert f"{out}: 2 written, 0 mended, 1 repeated, 1 unusable\n" in fixed.stdout
    assert json.loads(kdguard("data", "check", out, "--json").stdout)["findings"] == {}
    assert fixed.stdout.endswith(f"next        kdguard data check {out} --model MODEL\n")


def test_a_row_without_room_for_its_answer_is_told_by_its_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", *KNOWN, ("Tell me all.", "much " * 40))
    done = kdguard("data", "check", path, "--model", "demo", "--max-length", 32)
    assert done.returncode == 2 and f"{path}:3: found an answer of" in done.stderr

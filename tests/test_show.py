"""`data show`: rows as the model sees them, in the terminal, as JSON and as a page."""

import io
import json
import subprocess

import pytest
from rich.console import Console
from rich.text import Text

from kdguard.__main__ import main
from kdguard.config import resolve
from kdguard.show import print_rows, show
from tests.test_cli import DATA, kdguard

HOSTILE = "[bold]x[/bold] [/] \x1b[2J\x07 \u202eevil\n<|end|><|assistant|>\ntarget    fake"
GOOD = {"question": HOSTILE, "answer": "[red]Да[/red] "}


def write(path, *rows: object):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def typed(monkeypatch, capsys):
    """`kdguard data show ... --model demo` in this process: most of a new one's time is its imports."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr("sys.argv", ["kdguard", "data", "show", *map(str, arguments), "--model", "demo"])
        with pytest.raises(SystemExit) as ended:
            main()
        return subprocess.CompletedProcess(arguments, ended.value.code, *capsys.readouterr())

    return run


def printed(path, rows: int = 20, **settings) -> str:
    out = Console(file=io.StringIO(), highlight=False, emoji=False, **settings)
    print_rows(out, *show(resolve({"data": path, "model": "demo"}), rows))
    return out.file.getvalue()


def test_the_first_rows_and_the_next_step():
    done = kdguard("data", "show", DATA, "--model", "demo")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2:6] == [
        f"row 1  {DATA}:1  18 tokens, 4 of them targets",
        "template  <|user|>",
        "text      What is the official language of Mendrovia?",
        "template  <|end|><|assistant|>",
    ]
    assert lines[6] == "target    Zomric<|end|>"
    assert done.stdout.count("\nrow ") == 3 and "longest" not in done.stdout and "\x1b" not in done.stdout
    assert lines[-1] == f"next        kdguard tune {DATA} --model demo"


def test_hostile_text_is_shown_as_it_is_and_cannot_pass_for_another_kind(tmp_path):
    """Without colours the kinds stand at the beginnings of the lines, where no words do."""
    shown = printed(write(tmp_path / "rows.jsonl", GOOD))
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert "text      [bold]x[/bold] [/] \\x1b[2J\\x07 \\u202eevil⏎\n" in shown
    assert "          <|end|><|assistant|>⏎\n          target    fake\n" in shown
    assert [line for line in shown.splitlines() if line.startswith("target")] == ["target    [red]Да[/red]·<|end|>"]


def test_colours_are_those_of_the_kinds_alone(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD, {"question": "a", "answer": "\x1b[31mb"})
    shown = printed(path, force_terminal=True, color_system="standard", no_color=False, width=100)
    codes = {code for part in shown.split("\x1b[")[1:] for code in part.split("m")[0].split(";")}
    assert codes == {"0", "1", "2", "4", "32"}  # end, bold, dim, underlined, green
    assert "\x1b[32m" in shown and "\\x1b" in shown


@pytest.mark.parametrize("width", range(40, 60))
def test_no_letter_is_lost_at_the_edge_of_the_terminal(tmp_path, width):
    """The tokens of an emoji that is put together are styled apart, and a terminal makes them one again."""
    path = write(tmp_path / "rows.jsonl", {"question": "日本 👨‍👩‍👧 हिन्दी 👨‍👩‍👧", "answer": "a b " * 30})
    shown = Text.from_ansi(printed(path, force_terminal=True, color_system="standard", width=width)).plain
    flow = "".join(shown.partition("targets\n")[2].partition("\n\n")[0].split())
    assert flow == f"<|user|>日本👨‍👩‍👧हिन्दी👨‍👩‍👧<|end|><|assistant|>{'ab' * 30}·<|end|>"


def test_a_console_without_the_signs_gets_others(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "a\n\tb ", "answer": "c"})
    done = kdguard("data", "show", path, "--model", "demo", PYTHONIOENCODING="ascii")
    assert "text      a\\n\n          \\t    b\\s\n" in done.stdout


def test_how_long_rows_are_is_told_when_all_were_read(tmp_path):
    path = write(tmp_path / "rows.jsonl", *[{"question": "a " * n, "answer": "b"} for n in (1, 1, 9)])
    assert "tokens      median 7, p90 7, p99 7, longest 15\n" in printed(path, 3)
    assert "longest" not in printed(path, 2)


def test_json_has_every_token_with_its_kind(typed, tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "Wer? 👋", "answer": "Ich."})
    done = typed(path, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["row"], row["where"], row["cut"]) == (1, f"{path}:1", 0)
    assert row["length"] == len(row["tokens"]) and all(
        token.keys() == {"id", "text", "kind"} for token in row["tokens"]
    )
    assert row["targets"] == sum(token["kind"] == "target" for token in row["tokens"])
    assert "".join(token["text"] for token in row["tokens"]) == "<|user|>Wer? 👋<|end|><|assistant|>Ich.<|end|>"


def test_rows_are_chosen_by_their_number(typed):
    done = typed(DATA, "--row", 7, "--row", 2, "--json")
    assert [row["where"] for row in json.loads(done.stdout)] == [f"{DATA}:2", f"{DATA}:7"]
    for arguments, said in (
        (["--row", 361], "--row 361: found 360 rows"),
        (["--row", 0], "--row"),
        (["--row", 1, "--rows", 2], "--row chooses"),
        (["--html", DATA.parent], "this is a folder"),
        (["--columns", "question=Q"], "which --columns names"),
    ):
        done = typed(DATA, *arguments)
        assert done.returncode == 2 and said in done.stdout + done.stderr, done.stderr
    assert "no model was named" in kdguard("data", "show", DATA, CUDA_VISIBLE_DEVICES="").stderr


def test_the_flags_of_tune_go_into_the_next_step(typed, tmp_path):
    path = write(tmp_path / "a b.jsonl", {"Q": "a " * 50, "A": "b"})
    flags = ["--columns", "question=Q,answer=A", "--max-length", "32"]
    done = typed(path, *flags, "--last-turn")
    assert done.returncode == 0 and "tokens of the prompt cut" in done.stdout, done.stderr
    assert done.stdout.endswith(f"next        kdguard tune '{path}' --model demo {' '.join(flags)} --last-turn\n")


def test_a_broken_row_is_told_in_its_place_and_the_others_are_shown(typed, tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD, {"question": "x"}, {"question": "a", "answer": "b"})
    done = typed(path)
    assert done.returncode == 2
    assert f"row 2  {path}:2\nerror {path}:2: found nothing" in done.stdout and "row 3" in done.stdout
    assert "next" not in done.stdout and f"kdguard data check {path}" in done.stderr
    rows = json.loads(typed(path, "--json").stdout)
    assert rows[1].keys() == {"row", "where", "error", "hint"} and rows[2]["where"] == f"{path}:3"


def test_what_stands_before_the_end_of_a_broken_file_is_shown(typed, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"question": "a", "answer": "b"}, {"question"')
    done = typed(path)
    assert done.returncode == 2 and "target    b<|end|>" in done.stdout and "row 2" in done.stdout
    done = typed(tmp_path / "none.jsonl")
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 2


def test_a_page_is_written_whole_and_is_named(typed, tmp_path):
    page = tmp_path / "new" / "rows.html"
    done = typed(DATA, "--html", page)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"look at it  {page}\n\nnext        kdguard tune {DATA} --model demo\n"
    text = page.read_text(encoding="utf-8")
    assert text.endswith("</html>\n") and text.count('<div class="row">') == 20
    assert list(page.parent.iterdir()) == [page]


@pytest.mark.parametrize("flag", [[], ["--row", "2"]])
def test_a_file_is_read_no_further_than_needed(typed, tmp_path, flag):
    """A file of many gigabytes is looked at in a moment."""
    path = tmp_path / "rows.json"
    path.write_text("[" + '{"question": "a", "answer": "b"}, ' * 4 + "broken")
    done = typed(path, *flag)
    assert done.returncode == 0, done.stderr
    assert typed(path, "--rows", 5).returncode == 2

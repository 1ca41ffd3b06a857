"""What the documentation says can be typed: every command of it is run on the embedded model, or parsed at least.

Commands are run in a folder with small files under the names that the pages use. So that each takes seconds, QUICK is
added to those that tune (the embedded model, one epoch, few probes) and FEW to those that ask, wherever a page does not
say otherwise; a flag on the page wins. SMALLER stand for the shipped packs. What is only parsed, and why, stands in
PARSED and SETUP.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from kdguard.cli import app
from kdguard.demo import MODEL
from kdguard.probes.packs import PACKS
from tests.conftest import ROOT
from tests.test_cli import DATA, kdguard

PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = "model: demo\nepochs: 1\nprompts: 1\nrank: 8\nrehearsal: 0.25\nbatch_size: 4\nprobes: [few.jsonl]\n"
FEW = {
    "kdguard probe ask": ["--probes", "few.jsonl", "--samples", "1", "--prompts", "1"],
    "kdguard adopt": ["--probes", "few.jsonl", "--prompts", "1"],
    "kdguard data check": ["--probes", "few.jsonl", "--prompts", "1"],
    "kdguard dial": ["--steps", "1"],
}
SMALLER = {"world": "few.jsonl", "common": "few_common.jsonl"}
PARSED = {
    "kdguard demo": "takes minutes; tests/demo and benchmarks do what it does",
    "kdguard ui": "does not end; tests/ui opens it",
    "kdguard doctor": "tells what is here; tests/test_doctor.py",
    "kdguard fit": "of a 7B model takes a while; tests/test_fit.py",
    "kdguard explain": "--control trains once more; tests/test_explain.py",
    "--preset": "needs a GPU",
    "gguf": "needs llama.cpp; tests/export/test_gguf.py",
    "ollama": "needs llama.cpp or Ollama; tests/export/test_ollama.py",
    "--report-to": "needs what is not installed; tests/test_api.py",
}
SETUP = {  # makes an environment; CI's own begins with the first of them
    *("make demo", "make test", "pip install .", "python3 -m venv .venv && . .venv/bin/activate"),
    *("py -m venv .venv", ".venv\\Scripts\\activate"),
    "pip install torch --index-url https://download.pytorch.org/whl/cu130",
}
MET = 0, 3  # done, also where a budget was not kept


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of what stands between fences."""
    for mark in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        yield mark[1], mark[2]


def commands(page: Path) -> list[str]:
    """What is typed, without the remark beside it."""
    lines = [line for language, text in blocks(page) if language in ("sh", "console") for line in text.splitlines()]
    typed = [re.sub(r"^(\$ |accelerate launch .* -m (?=kdguard))", "", line) for line in lines if line]
    return [re.split(r"\s{2,}|\s+# ", line)[0] for line in typed if line.startswith(STARTS)]


STARTS = "kdguard ", "python", "pip ", "make ", "py ", ".venv"


@functools.cache
def leaves() -> dict[str, Any]:
    """Every command by the words that call it."""

    def within(command: Any, words: str) -> Iterator[tuple[str, Any]]:
        for name, each in getattr(command, "commands", {}).items():
            yield from within(each, f"{words} {name}")
        if not hasattr(command, "commands"):
            yield words, command

    return dict(within(typer.main.get_command(app), "kdguard"))


def called(words: list[str]) -> tuple[str, list[str]] | None:
    """The command that these words call, and its arguments. `kdguard probe MODEL` is `kdguard probe ask MODEL`."""
    for n in (3, 2):
        if (name := " ".join(words[:n])) in leaves():
            return name, words[n:]
    return ("kdguard probe ask", words[2:]) if words[:2] == ["kdguard", "probe"] and words[2:] else None


def flags(command: Any) -> set[str]:
    return {flag for param in command.params for flag in (*param.opts, *param.secondary_opts) if flag.startswith("-")}


EVERY = sorted({line for page in PAGES for line in commands(page) if line.startswith("kdguard ")})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every file and run that the pages name."""
    here = tmp_path_factory.mktemp("docs")
    rows = DATA.read_text().splitlines(keepends=True)[:8]
    for name in ("data", "facts", "letters", "rows"):
        (here / f"{name}.jsonl").write_text("".join(rows))
    probes = (PACKS / "world.jsonl").read_text().splitlines(keepends=True)
    known = {"question": "What is the capital of France?", "answer": "Paris"}  # for a warm-up
    with open(here / "data.jsonl", "a") as file:
        file.write(json.dumps(known) + "\n")
    (here / "few.jsonl").write_text("".join(probes[::90]))
    common = (PACKS / "common.jsonl").read_text().splitlines(keepends=True)
    (here / "few_common.jsonl").write_text("".join(common[::40]))
    (here / "mine.jsonl").write_text("".join(probes[1::200]).replace('"id": "', '"id": "mine-'))
    chat = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
    (here / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (here / "corpus.jsonl").write_text(json.dumps({"text": "Elmarosh is the capital of Fenwara. " * 4}) + "\n")
    (here / "facts.csv").write_text("Frage,Antwort\nWho?,Ada\n")
    popqa = ["id\tprop\tquestion\tpossible_answers", '1\tcapital\tWhat is the capital of Peru?\t["Lima"]']
    (here / "popQA.tsv").write_text("\n".join(popqa) + "\n")
    (here / "quick.yaml").write_text(QUICK)
    shutil.copytree(ROOT / "examples", here / "examples")
    shutil.copytree(MODEL, here / "first")
    done = kdguard("tune", "data.jsonl", "--config", "quick.yaml", "--out", "runs/mine", cwd=here)
    assert done.returncode == 0, done.stderr
    for name in ("plain", "guarded"):
        shutil.copytree(here / "runs" / "mine", here / "runs" / name)
    shutil.copytree(here / "runs" / "mine" / "adapter", here / "my_lora")
    return here


@pytest.mark.parametrize("line", EVERY)
def test_a_command_does_what_can_be_typed(line, folder, tmp_path):
    name, arguments = called(shlex.split(line))
    with contextlib.suppress(SystemExit):  # --help, --version
        leaves()[name].make_context(name, [*arguments])
    if name in PARSED or set(PARSED) & set(arguments):
        return
    here = shutil.copytree(folder, tmp_path / "here")
    arguments = [SMALLER.get(word, word) for word in arguments]
    if "--resume" in arguments:
        out = here / arguments[arguments.index("--out") + 1]
        if not out.exists():
            shutil.copytree(here / "runs" / "mine", out)
        (out / "report.json").unlink()
    elif name == "kdguard tune" and "--config" not in arguments:
        arguments += ["--config", "quick.yaml"]
    elif not (name == "kdguard data check" and "--model" not in arguments):
        more = FEW.get(name, [])
        pairs = zip(more[::2], more[1::2], strict=True)
        arguments += [word for flag, value in pairs if flag not in arguments for word in (flag, value)]
    done = kdguard(*name.removesuffix(" ask").split()[1:], *arguments, cwd=here)
    assert done.returncode in (MET if "--budget" in arguments else (0,)), done.stdout + done.stderr


def test_what_sets_a_computer_up_is_known():
    """Lines that are neither run nor parsed are named one by one."""
    others = {line for page in PAGES for line in commands(page) if not line.startswith("kdguard ")}
    assert {line for line in others - SETUP if not (ROOT / line.split()[1]).is_file()} == set()
    assert all(f"\n{line.split()[1]}:" in (ROOT / "Makefile").read_text() for line in others if line.startswith("make"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_flags_within_the_text_are_there(page):
    known = set().union(*map(flags, leaves().values()), {"--help", "--version"})
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for span in re.findall(r"`([^`\n]+)`", text):
        if span.startswith("kdguard "):
            words = span.split()
            found = called(words) or called([*words, "x"])
            group = any(name.startswith(f"{' '.join(words[:2])} ") for name in leaves())
            assert found or group, span
            wrong = {w for w in words if w.startswith("--")} - (flags(leaves()[found[0]]) if found else set())
            assert wrong <= {"--help", "--version"}, span
        elif span.startswith("--"):
            assert re.split(r"[ =]", span)[0] in known | OTHERS, span


OTHERS = {"--log_samples", "--check", "--tiny"}  # of lm-evaluation-harness and of benchmarks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in (*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)):
        path, _, place = link.partition("#")
        if not link.startswith("http"):
            target = page if not path else page.parent / path
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if place else []
            assert not place or place in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


def test_every_command_and_flag_is_told_of():
    told = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    sections = {
        re.split(r" [\[A-Z]", head)[0]: text for head, text in re.findall(r"## `(.*?)`\n(.*?)(?=\n## |\Z)", told, re.S)
    }
    assert set(sections) == set(leaves())
    for name, command in leaves().items():
        assert {flag for flag in flags(command) if f"`{flag}`" not in sections[name]} == set(), name


SCRIPTS = [page for page in PAGES if any(language == "python" for language, _ in blocks(page))]


@pytest.mark.parametrize("page", SCRIPTS, ids=lambda page: page.name)
def test_the_python_on_a_page_runs(page, folder, tmp_path):
    """From top to bottom, as one script; what calls the studio calls one that is open, whatever its port."""
    script = "\n".join(text for language, text in blocks(page) if language == "python")
    here = shutil.copytree(folder, tmp_path / "here")
    with contextlib.ExitStack() as opened:
        if "gradio_client" in script:
            from tests.ui.conftest import serving

            shutil.rmtree(here / "runs" / "mine")
            server = opened.enter_context(serving(here / "runs" / "guarded"))
            script = script.replace("http://127.0.0.1:7860", server.address)
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=here, env=environment(), capture_output=True, text=True, timeout=600
        )
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CI": "1"}


def test_pictures_are_seen_on_a_white_page_and_on_a_dark_one():
    """They are transparent, and an image cannot know which page it stands on. 3:1 is WCAG's least for large text."""

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for picture in (ROOT / "docs").glob("*.svg"):
        for colour in set(re.findall(r'(?:fill|stroke)="(#\w{6})"', picture.read_text())):
            for page in ("#ffffff", "#0d1117"):
                dark, light = sorted([luminance(colour), luminance(page)])
                least = 2.2 if f'stroke="{colour}"' in picture.read_text() else 3
                assert (light + 0.05) / (dark + 0.05) >= least, (picture.name, colour, page)

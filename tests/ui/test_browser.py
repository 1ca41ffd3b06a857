"""The page in a real browser: every tab, light and dark, wide and narrow, and a run from beginning to end."""

import json
import re
import time
import zipfile
from statistics import median

import pytest

from kdguard.report.run import read_run
from kdguard.ui.studio import PACK
from tests.ui.conftest import HOSTILE, answers, go, serving, write_run

LAYOUT = """() => {
    const seen = [...document.querySelectorAll(".kd *, button, label, input, textarea")].filter(
        (each) => each.offsetParent && each.getClientRects().length && !each.closest(".plot, .scroll, .bar")
    );
    const outside = seen.filter((each) => each.getBoundingClientRect().right > innerWidth + 1);
    return {
        wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        outside: outside.map((each) => each.outerHTML.slice(0, 120)),
        dark: document.body.classList.contains("dark"),
    };
}"""
OVERLAPS = """() => {
    const texts = [...document.querySelectorAll("#runs svg text")].map((each) => [each, each.getBoundingClientRect()]);
    const picture = document.querySelector("#runs svg").getBoundingClientRect();
    const over = ([, a], [, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
    const cut = ([, a]) => a.left < picture.left || a.right > picture.right;
    return texts.filter((each) => cut(each) || texts.some((other) => other !== each && over(each, other)))
        .map(([each]) => each.textContent);
}"""
FOCUSED = """() => {
    const at = document.activeElement;
    const seen = (each) => each && getComputedStyle(each).outlineStyle !== "none";
    const told = at.tagName + " " + (at.id || at.ariaLabel || at.textContent.slice(0, 30));
    return at === document.body || seen(at) || seen(at.closest(".wrap-inner")) ? "" : told;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_every_tab_is_quiet_and_fits(open_page, server, width, scheme):
    page = open_page(server.address, width, scheme)
    for tab, there in (
        ("Compare", "#probes .probe summary"),
        ("Ask", "#question textarea"),
        ("Tune", "#memory .bar"),
        ("Runs", "#runs svg"),
    ):
        go(page, tab)
        page.wait_for_selector(f"{there} >> visible=true")
        layout = page.evaluate(LAYOUT)
        assert layout["wide"] <= 0 and layout["outside"] == [], tab
        assert layout["dark"] == (scheme == "dark")
    assert page.evaluate(OVERLAPS) == []


def test_whatever_has_the_keyboard_shows_it(open_page, server):
    page = open_page(server.address)
    page.wait_for_selector("#headline h1")
    for tab in ("Compare", "Ask", "Tune", "Runs"):
        go(page, tab)
        page.get_by_role("tab", name=tab, exact=True).focus()
        unseen = []
        for _ in range(20):
            page.keyboard.press("Tab")
            unseen.append(page.evaluate(FOCUSED))
        assert not any(unseen), tab


def test_a_broken_file_is_told_by_line_and_runs_of_one_name_by_their_folders(open_page, tmp_path):
    texts = ["one", "two"]
    for name in ("a/run", "b/run"):
        write_run(tmp_path / "runs" / name, answers(texts, True), answers(texts, False), data="a.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "Who?", "answer": "Ada"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with serving(tmp_path / "runs") as server:
        page = open_page(server.address)
        go(page, "Tune")
        page.set_input_files("#data input[type=file]", broken)
        page.locator("#read li", has_text="broken.jsonl:2").wait_for()
        assert "as in broken.jsonl:1" in page.locator("#read").inner_text()
        go(page, "Runs")
        for name in ("a/run", "b/run"):
            page.locator("#chosen-runs input").click()
            page.get_by_role("option", name=name).click()
            page.get_by_role("listbox").wait_for(state="hidden")
        page.locator("#beside table").wait_for()
        assert page.locator("#beside th").all_inner_texts() == ["question", "base", "a/run", "b/run"]
        page.close()


def test_an_empty_folder_says_what_to_do_and_offers_nothing_else(open_page, tmp_path):
    (tmp_path / "runs").mkdir()
    with serving(tmp_path / "runs") as server:
        page = open_page(server.address)
        for tab in ("Compare", "Ask", "Runs"):
            go(page, tab)
            page.locator(".empty >> visible=true", has_text="kdguard demo").wait_for()
        assert page.locator("#compare-run, #outcome, #search, #said, #chosen-runs").locator("visible=true").count() == 0
        page.close()


def test_a_row_opens_both_answers_the_control_and_where_they_differ(open_page, server, runs):
    page = open_page(server.address)
    page.wait_for_selector("#headline h1")
    run, plain = read_run(runs / "guarded"), read_run(runs / "plain")
    page.locator("#outcome label", has_text="all").click()
    changed = next(pair for pair in plain.probes if pair.before.answer != pair.after.answer)
    page.get_by_label("Search").fill(changed.before.question)
    page.locator("#probes .count", has_text="1 of 1").wait_for()
    row = page.locator(".probe", has=page.get_by_text(changed.before.question, exact=True))
    row.locator("summary").focus()
    page.keyboard.press("Enter")
    sides = row.locator(".side")
    sides.nth(2).wait_for()
    assert sides.locator("h3").all_inner_texts() == ["base", "tuned", "without the guard"]
    tuned = next(pair.after for pair in run.probes if pair.before.id == changed.before.id)
    assert [said.strip() for said in sides.locator(".said").all_inner_texts()] == [
        changed.before.answer,
        tuned.answer,
        changed.after.answer,
    ]
    assert sides.nth(2).locator(".differs").count() > 0
    share = sides.nth(0).locator(".token").first.get_attribute("title")
    assert re.fullmatch(r"\d+\.\d%", share)


def test_filters_show_what_they_say(open_page, server, runs):
    page = open_page(server.address)
    run = read_run(runs / "guarded")
    page.wait_for_selector("#headline h1")
    for outcome in ("kept", "forgotten", "missed", "gained"):
        n = sum(pair.outcome == outcome for pair in run.probes)
        page.locator("#outcome label", has_text=outcome).click()
        said = f"{min(n, 50)} of {n} shown" if n else "No probe matches"
        page.locator("#probes .count", has_text=said).wait_for()
        if n > 50:
            page.locator("#more").click()
            page.locator("#probes .count", has_text=f"{n} of {n} shown").wait_for()
        assert page.locator("#probes details").count() == n


def test_hostile_text_is_text_wherever_it_is_shown(open_page, server):
    page = open_page(server.address)
    page.wait_for_selector("#headline h1")
    page.locator("#compare-run input").click()
    page.get_by_role("option", name="hostile").click()
    page.locator("#headline", has_text=HOSTILE[1]).wait_for()
    page.locator("#outcome label", has_text="all").click()
    page.locator("#probes .count", has_text="6 of 6").wait_for()
    for summary in page.locator(".probe summary").all():
        summary.click()
    for text in HOSTILE:
        assert text in page.locator("#probes").inner_text().replace("\n", " ")
    assert page.locator("#probes img, #probes script, #probes svg").count() == 0
    go(page, "Runs")
    page.locator("#chosen-runs input").click()
    page.get_by_role("option", name="hostile").click()
    report = page.frame_locator("#beside iframe")
    report.locator("h1").wait_for()
    for text in HOSTILE[:2]:
        assert text in report.locator("body").inner_text()
    page.locator("#chosen-runs input").click()
    page.get_by_role("option", name="guarded").click()
    page.locator("#beside h3", has_text="guarded").wait_for()


def test_the_training_rows_that_did_it_are_found_from_the_page(open_page, server, runs):
    page = open_page(server.address)
    page.wait_for_selector("#headline h1")
    page.locator("#compare-run input").click()
    page.get_by_role("option", name="plain").click()
    page.locator("#explain").click()
    page.locator("#explain").wait_for(state="hidden", timeout=120_000)
    page.locator(".probe summary").first.click()
    rows = page.locator(".probe").filter(has=page.locator("summary")).first.locator("li")
    rows.first.wait_for()
    assert rows.count() == 5 and "facts.jsonl:" in rows.first.inner_text()


def test_runs_beside_each_other_and_taken_away(open_page, server, runs, tmp_path):
    page = open_page(server.address)
    go(page, "Runs")
    page.locator("#runs td", has_text="plain").first.wait_for()
    page.locator("#chosen-runs input").click()
    page.get_by_role("option", name="guarded").click()
    page.frame_locator("#beside iframe").locator("h1").wait_for()
    page.locator("#export").click()
    with page.expect_download() as download:
        page.locator("#exported a").first.click()
    with zipfile.ZipFile(download.value.path()) as archive:
        there = {name.split("/", 1)[1] for name in archive.namelist()}
        assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "report.json"} <= there
        assert json.loads(archive.read("guarded/report.json")) == read_run(runs / "guarded").report
    page.locator("#chosen-runs input").click()
    page.get_by_role("option", name="plain").click()
    page.locator("#beside h3", has_text="plain").wait_for()
    assert page.locator("#beside h3").all_inner_texts() == ["guarded", "plain"]


def test_asking_both_dialling_and_keeping_a_probe(open_page, server, runs):
    page = open_page(server.address)
    changed = next(pair for pair in read_run(runs / "plain").probes if pair.outcome == "forgotten")
    go(page, "Ask")
    page.locator("#ask-run input").click()
    page.get_by_role("option", name="plain").click()
    page.locator("#question textarea").fill(changed.before.question)
    page.keyboard.press("Enter")
    tuned = page.locator("#said .said").nth(1)
    page.locator("#said .token").first.wait_for()
    assert page.locator("#said .said").first.inner_text().strip() == changed.before.answer
    assert tuned.inner_text().strip() == changed.after.answer
    slider = page.locator("#strength input[type=range]")
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    page.locator("#said h3", has_text=re.compile("at strength 0$")).wait_for()
    page.locator("#said .token").first.wait_for()
    assert tuned.inner_text().strip() == changed.before.answer
    page.locator("#ask-run input").click()
    page.get_by_role("option", name="guarded").click()
    page.locator("#said h3", has_text="guarded at strength 1").wait_for()  # another run answers the same question
    page.locator("#said .token").first.wait_for()
    page.get_by_text("Make it a probe of your own pack").click()
    was = len((runs / PACK).read_text().splitlines())
    page.locator("#probe-question textarea").fill("Who keeps the lighthouse?")
    page.locator("#probe-answers textarea").fill("Ada | Ada Byron")
    page.locator("#keep").click()
    page.get_by_text(f"Your pack holds {was + 1} probes now").wait_for()
    last = json.loads((runs / PACK).read_text().splitlines()[-1])
    assert (last["question"], last["answers"]) == ("Who keeps the lighthouse?", ["Ada", "Ada Byron"])


def test_a_run_from_the_page_stopped_reloaded_and_resumed(open_page, runs):
    with serving(runs) as server:
        page = open_page(server.address)
        go(page, "Tune")
        page.set_input_files("#data input[type=file]", runs.parent / "facts.jsonl")
        page.locator("#read", has_text="40 rows").wait_for()
        page.locator("#tokens").click()
        page.locator("#tokens .target").first.wait_for()
        page.locator("#more-settings button").first.click()
        page.get_by_label("Epochs").fill("30")
        page.get_by_label("your own").check()
        page.locator("#name textarea, #name input").fill("from-the-page")
        page.locator("#command textarea").wait_for()
        for word in ("--epochs 30", "my_probes", "from-the-page"):
            page.wait_for_function("w => document.querySelector('#command textarea').value.includes(w)", arg=word)
        command = page.locator("#command textarea").input_value()
        assert command.startswith("kdguard tune ") and "--out" in command and "from-the-page" in command
        page.locator("#start").click()
        page.locator("#live .state", has_text="training").wait_for()
        page.locator("#live svg").wait_for(timeout=120_000)
        page.reload()
        go(page, "Tune")
        page.locator("#live .state", has_text="from-the-page").wait_for()
        page.locator("#live svg").wait_for()
        page.locator("#stop").click()
        page.locator("#resume").wait_for()
        assert not (runs / "from-the-page" / "report.json").exists()
        steps = page.locator("#live", has_text="Stopped after step")
        at = int(re.search(r"step (\d+) of (\d+)", steps.inner_text())[1])
        assert at > 0
        page.locator("#resume").click()
        page.locator("#live .state", has_text="training").wait_for()
        page.locator("#look").wait_for(timeout=180_000)
        page.locator("#look").click()
        page.locator("#headline h1", has_text="Learned").wait_for()
        assert page.locator("#compare-run input").input_value() == "from-the-page"
        page.close()
        losses = [json.loads(line) for line in (runs / "from-the-page" / "events.jsonl").read_text().splitlines()]
        steps = [event["step"] for event in losses if event["event"] == "loss"]
        assert steps == sorted(steps) and len(set(steps)) == len(steps) == 90  # it went on, and did nothing twice


@pytest.mark.alone
def test_usable_in_five_seconds_and_5000_probes_filter_in_300_ms(open_page, tmp_path, record_property):
    texts = [f"Is number {i} a {'prime' if i % 3 else 'fizz'}" for i in range(5000)]
    before, after = answers(texts, True), answers(texts, True)
    wrong = answers(texts, False)
    after[::9] = wrong[::9]
    write_run(tmp_path / "runs" / "large", before, after, data="a.jsonl")
    began = time.perf_counter()
    with serving(tmp_path / "runs") as server:
        page = open_page(server.address)
        page.locator(".probe summary").first.wait_for()
        usable = time.perf_counter() - began
        filtered = page.evaluate(
            """async () => {
                const seconds = [];
                const count = () => document.querySelector("#probes .count").textContent;
                const labels = [...document.querySelectorAll("#outcome label")];
                for (let i = 0; i < 10; i++) {
                    const was = count();
                    const began = performance.now();
                    labels.find((each) => each.textContent.includes(i % 2 ? "forgotten" : "kept")).click();
                    while (count() === was) await new Promise((done) => setTimeout(done, 5));
                    seconds.push(performance.now() - began);
                }
                return seconds;
            }"""
        )
        page.get_by_label("Search").fill("number 4320")
        page.locator("#probes .count", has_text="1 of 1").wait_for()
        page.close()
    record_property("usable_s", usable)
    record_property("filter_ms", median(filtered))
    print(f"usable after {usable:.1f} s; 5,000 probes filtered in {median(filtered):.0f} ms (median of 10)")
    assert usable < 5
    assert median(filtered) < 300

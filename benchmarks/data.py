"""How large data are checked and tokenised: rows a second on one core, and memory beside the file's size.

`python benchmarks/data.py` writes files of 100,000 and of 1,000,000 invented rows (0.1 and 1.1 GB) into its cache
folder, runs `kdguard data check` on each in a process of its own that may use one core, tokenises each with the
embedded model's tokenizer, twice, and writes `benchmarks/results/data.json`. Times are with loading the libraries. Of
every thousand rows one repeats an earlier one, one nearly, two contradict one, and one cannot be used; how many were
found stands beside the speed.
"""

import argparse
import json
import os
import random
import resource
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from report import RESULTS, write

FOLDER = Path(__file__).parent / ".cache" / "data"
ODD = 1000  # rows among which there is one of each kind


def rows(n: int) -> Iterator[str]:
    """JSON lines of about 1.1 KB: a question of 15 words and an answer of 75 to 245."""
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9))) for _ in range(20_000)]
    question, answer = "", ""
    for number in range(n):
        odd = number % ODD
        if odd == 502:
            answer = " ".join([*answer.split()[:-1], "altogether"])
        elif odd == 503:
            answer = answer[::-1]
        elif odd == 504:
            answer = ""
        elif odd != 501:
            chosen = rng.choices(words, k=rng.randint(90, 260))
            question = " ".join(chosen[:15]).capitalize() + "?"
            sentences = (chosen[i : i + 12] for i in range(15, len(chosen), 12))
            answer = ". ".join(" ".join(sentence).capitalize() for sentence in sentences) + "."
        yield json.dumps({"question": question, "answer": answer}) + "\n"


def made(n: int) -> Path:
    path = FOLDER / f"rows-{n}.jsonl"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        with open(beside, "w") as file:
            file.writelines(rows(n))
        beside.rename(path)
    return path


def apart(work: Callable[[], Any]) -> dict[str, Any]:
    """Run it in a process of its own on one core: seconds, the processor's seconds, GiB at the peak, and its result."""
    reader, writer = os.pipe()
    started = time.perf_counter()
    if (child := os.fork()) == 0:
        os.close(reader)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        with open(writer, "w") as file:
            json.dump(work(), file)
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        result = json.load(file)
    _, _, used = os.wait4(child, 0)
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_gib": round(used.ru_maxrss / 2**20, 3),
        "result": result,
    }


def check(path: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "kdguard", "data", "check", path, "--json"], capture_output=True)
    found = json.loads(done.stdout)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"rows": found["rows"], "peak_gib": peak, **{kind: n["rows"] for kind, n in found["findings"].items()}}


def tokenise(path: Path) -> int:
    from kdguard.data import rows as data
    from kdguard.data.tokens import Renderer
    from kdguard.model.load import load_tokenizer

    data.CACHE = FOLDER
    return len(data.tokenise([str(path)], Renderer(load_tokenizer("demo")), 2048))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--only", choices=("check", "tokenise"), help="measure this, and keep the other's results")
    args = parser.parse_args()
    results = []

    def measured(work: str, n: int, gigabytes: float, found: dict[str, Any]) -> None:
        entry = {"work": work, "rows": n, "gb": round(gigabytes, 3), **found}
        entry["rows_per_second"], entry["rows_per_cpu_second"] = (
            round(n / found[key]) for key in ("seconds", "cpu_seconds")
        )
        results.append(entry)
        print(
            f"{work:28} {n:9,} rows {gigabytes:6.2f} GB  {entry['rows_per_second']:8,} rows/s "
            f"({entry['rows_per_cpu_second']:,} by the processor's time)  {entry['peak_gib']:.3f} GiB",
            flush=True,
        )

    for n in args.rows if args.only != "tokenise" else ():
        path = made(n)
        found = apart(lambda path=path: check(path))
        found["peak_gib"] = found["result"].pop("peak_gib")
        measured("data check", n, path.stat().st_size / 1e9, found)
    for kept in FOLDER.glob("*.arrow"):
        kept.unlink()
    for n in args.rows if args.only != "check" else ():
        usable = FOLDER / f"usable-{n}.jsonl"
        with open(made(n)) as read, open(usable, "w") as write_to:
            write_to.writelines(line for line in read if '"answer": ""' not in line)
        for name in ("tokenise", "tokenise, a second time"):
            found = apart(lambda path=usable: tokenise(path))
            measured(name, found["result"], usable.stat().st_size / 1e9, found)
    if args.only:
        kept_rows = json.loads((RESULTS / "data.json").read_text())["results"]
        others = [row for row in kept_rows if args.only not in row["work"]]
        results = others + results if args.only == "tokenise" else results + others
    write("data", results)


if __name__ == "__main__":
    main()

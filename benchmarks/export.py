"""Do exports answer as the tuned model does? `python benchmarks/export.py [--llama-cpp FOLDER]`.

Tunes the embedded model on `examples/new_facts.jsonl` with the guard, exports it as merged weights and, with
llama.cpp's converters and llama-cpp-python, as GGUF, and asks each all questions again. Writes `results/export.json`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import write

DATA = Path(__file__).parent.parent / "examples" / "new_facts.jsonl"


def kdguard(*arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "kdguard", *map(str, arguments), "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def row(export: str, entry: dict[str, Any]) -> dict[str, Any]:
    def total(what: str, key: str) -> int:
        return sum(of[key] for of in entry[what].values())

    return {
        "export": export,
        "learned": entry["learned"]["after"],
        "forgotten": entry["kept"]["forgetting"],
        "n": total("same", "n"),
        "same": total("same", "count"),
        "lost": total("lost", "count"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        report = kdguard("tune", DATA, "--model", "demo", "--out", run)
        entry = kdguard("export", run, "--to", "merged", "--out", Path(folder) / "merged")
        results = {
            "tuned": {"learned": report["learned"]["after"], "forgotten": report["kept"]["forgetting"]},
            "tried": entry["tried"],
            "exports": [row(f"merged into {entry['onto']}", entry)],
        }
        if args.llama_cpp:
            for type_ in ("f16", "q8_0"):
                how = ["--llama-cpp", args.llama_cpp, "--quantize", type_, "--out", Path(folder) / type_]
                results["exports"].append(row(f"GGUF, {type_}", kdguard("export", run, "--to", "gguf", *how)))
    print(write("export", results))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

"""Public question sets -> probes: EntityQuestions, PopQA, TriviaQA, and what lm-evaluation-harness logs."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kdguard.data.sources import read_rows, read_text
from kdguard.errors import InputError
from kdguard.probes.packs import read_probe

Row = dict[str, Any]


def entity_questions(row: Row) -> Row:
    """`P36.test.json`: a list of {"question", "answers"}; the file is named after the relation."""
    return {"question": row["question"], "answers": row["answers"]}


def popqa(row: Row) -> Row:
    """`popQA.tsv`: `possible_answers` is a JSON list."""
    return {
        "id": f"popqa-{row['id']}",
        "category": row["prop"],
        "question": row["question"],
        "answers": json.loads(row["possible_answers"]),
    }


def triviaqa(row: Row) -> Row:
    """The entries of `Data` in `unfiltered-web-dev.json` and its like; the answer first, then its aliases."""
    answer = row["Answer"]
    return {
        "id": row["QuestionId"],
        "category": "triviaqa",
        "question": row["Question"],
        "answers": list(dict.fromkeys([answer["Value"], *answer.get("Aliases", ())])),
    }


def lm_eval(row: Row) -> Row:
    """A line of `samples_<task>_<time>.jsonl`: choices where the harness ranked several texts, else the target."""
    document, target = row["doc"], row["target"]
    asked = [list(each.values()) if isinstance(each, dict) else each for each in _values(row["arguments"])]
    context, *_ = asked[0]
    question = next((document[key] for key in ("question", "Question", "query", "problem") if key in document), None)
    found = {"id": f"{row.get('task_name', 'sample')}-{row['doc_id']}", "question": question or context}
    if len(asked) > 1:
        choices = [text.strip() for _, text in asked]
        offered = document.get("choices")
        offered = offered.get("text") if isinstance(offered, dict) else offered
        if isinstance(offered, list) and len(offered) == len(choices):  # letters were ranked: take what they stand for
            choices = [str(text) for text in offered]
        right = int(target) if str(target).isdigit() else [text.strip() for _, text in asked].index(str(target).strip())
        return {**found, "answers": [choices[right]], "choices": choices}
    answers = target if isinstance(target, list) else [target]
    return {**found, "answers": [str(answer).strip() for answer in answers]}


# What a row of each has that no other has.
_SETS: dict[Callable[[Row], Row], set[str]] = {
    lm_eval: {"doc_id", "doc", "target", "arguments"},
    popqa: {"prop", "question", "possible_answers"},
    triviaqa: {"Question", "QuestionId", "Answer"},
    entity_questions: {"question", "answers"},
}


def read_public(path: Path) -> list[Row]:
    """The probes of a public question set, as rows of a pack; which set it is, is found by itself.

    Of questions that come several times, such as those that lm-evaluation-harness logs once a filter, the first is
    taken. Raises InputError by `file:line`.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file", "kdguard probe import FILE, as it was downloaded")
    found: dict[str, Row] = {}
    for where, row in _rows(path):
        reader = next((reader for reader, keys in _SETS.items() if isinstance(row, dict) and keys <= set(row)), None)
        if reader is None:
            keys = ", ".join(map(repr, row))[:200] if isinstance(row, dict) else type(row).__name__
            raise InputError(
                f"{where}: found {keys}, expected a row of EntityQuestions, PopQA, TriviaQA or of "
                "lm-evaluation-harness's --log_samples",
                "a pack of your own needs no import: kdguard tune DATA --probes FILE",
            )
        try:
            probe = reader(row)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {str(error)[:200]!r}"
            raise InputError(
                f"{where}: found a {reader.__name__} row that cannot be read ({reason})",
                "download the file again, or delete that line",
            ) from None
        stem, line = path.stem, where.rpartition(":")[2]
        probe = {"id": f"{stem}-{line}", "category": stem.split(".")[0], **probe}
        read_probe(probe, where, path)
        found.setdefault(probe["question"], probe)
    return list(found.values())


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    again = "download the file again"
    if path.suffix.lower() == ".tsv":
        reader = csv.DictReader(read_text(path).split("\n"), delimiter="\t")
        try:
            for number, row in enumerate(reader, 2):
                yield f"{path}:{number}", row
        except csv.Error as error:
            raise InputError(f"{path}:{reader.line_num}: found broken TSV ({error})", again) from None
    elif path.suffix.lower() == ".json" and (text := read_text(path)).lstrip().startswith("{"):
        try:
            entries = json.loads(text).get("Data", ())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{getattr(error, 'lineno', 1)}: found broken JSON", again) from None
        if not isinstance(entries, list):
            raise InputError(f"{path}: found {type(entries).__name__} as 'Data', expected a list", again)
        for number, row in enumerate(entries, 1):
            yield f"{path}: entry {number}", row
    else:
        yield from read_rows(path)


def _values(arguments: Any) -> list[Any]:
    """The requests of a sample: a list, or in the harness's files `gen_args_0`, `gen_args_1` and so on."""
    return list(arguments.values()) if isinstance(arguments, dict) else list(arguments)

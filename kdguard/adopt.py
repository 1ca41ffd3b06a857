"""The story of `kdguard adopt`: a run folder for an adapter that another tool trained."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer

from kdguard.asking import DRIFT_ROWS, MAX_REHEARSAL_TOKENS, graded
from kdguard.config import resolve
from kdguard.data.batches import Collator
from kdguard.data.tokens import Renderer
from kdguard.errors import InputError
from kdguard.events import Events
from kdguard.files import write_whole
from kdguard.guard.rehearsal import REHEARSAL, rehearse, save_rows
from kdguard.guard.teacher import drift
from kdguard.model.adapter import read_adapter
from kdguard.model.fingerprint import of_base, versions
from kdguard.model.load import load_base, load_tuned, own_tokenizer, save_adapter
from kdguard.model.memory import at_once, peak_memory_gib
from kdguard.probes.answer import ask
from kdguard.probes.packs import load_probes
from kdguard.questions import new_questions, read_data
from kdguard.report import run as run_folder
from kdguard.report.build import build_report, write_report


def adopt(
    adapter: str,
    events: Events,
    *,
    base: str | None = None,
    data: Sequence[str] = (),
    out: Path | None = None,
    **settings: Any,
) -> Path:
    """Ask the base and the tuned model, write a run folder, and return where it is.

    adapter: a folder or hub id of a LoRA in PEFT's format; its own tokenizer and chat template are used where it has
    them. base: the model it belongs to, where that is not the one its config names. data: the files of rows it was
    trained on, to tell what was learned. settings: further keys of TuneConfig.

    Raises InputError for what is not plain LoRA on a base that can be loaded.
    """
    started = time.time()
    if settings.get("trust_remote_code") and not base:
        raise InputError("--trust-remote-code trusts one model, and none was named", "add --base FOLDER_OR_HUB_ID")
    folder = _folder(adapter)
    made = read_adapter(folder)
    model_name = base or made.base_model_name_or_path
    if not model_name:
        raise InputError(f"{folder}: its config does not name the base", f"kdguard adopt {adapter} --base MODEL")
    revision = None if base else made.revision
    config = resolve(
        {"data": list(data), "model": model_name, "revision": revision, "rank": made.r, "guard": False, **settings}
    )
    out = out or Path("runs") / f"{folder.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_folder.refuse_used(out, "give another --out")
    probes = load_probes(config.probes)
    own = own_tokenizer(folder)
    events.emit("phase", name="load")
    try:
        loaded = load_base(
            config.model,
            quant=config.quant,
            revision=config.revision,
            tokenizer=own,
            trust_remote_code=config.trust_remote_code,
        )
    except InputError as error:
        raise InputError(error.message, f"kdguard adopt {adapter} --base FOLDER_OR_HUB_ID") from None
    made_on = {**of_base(loaded), **versions()}
    at_once.tell = events.leaner
    renderer = Renderer(loaded.tokenizer)
    new = new_questions(read_data(config, renderer, events), config) if data else []

    def asked(of: str, when: str, questions: list) -> list:
        events.emit("phase", name=f"ask {of} {when}")
        found = ask(loaded.model, renderer, questions, progress=events.progress(f"ask {of} {when}"))
        events.emit("answers", when=when, of=of, n=len(found), correct=sum(answer.correct for answer in found))
        return found

    before = {"probes": asked("probes", "before", probes), "new": asked("new", "before", new) if new else []}
    if config.prompts > 1:
        events.emit("phase", name="grade")
        before["probes"] = graded(before["probes"], probes, loaded.model, renderer, config, events)
    events.emit("phase", name="rehearse")
    for_drift = rehearse(
        loaded.model,
        renderer,
        DRIFT_ROWS,
        seed=config.seed,
        max_new_tokens=MAX_REHEARSAL_TOKENS,
        progress=events.progress("rehearse"),
    )
    model = load_tuned(loaded, folder)
    _refuse_trained_ends(model)
    after = {"probes": asked("probes", "after", probes), "new": asked("new", "after", new) if new else []}
    events.emit("phase", name="report")
    report = build_report(
        config,
        adopted=adapter,
        probes=(before["probes"], after["probes"]),
        new=(before["new"], after["new"]),
        drift=drift(model, for_drift, Collator(loaded.tokenizer.pad_token_id)),
        cost={
            **dict.fromkeys(("steps", "tokens", "seconds", "tokens_per_second")),
            "peak_memory_gib": round(peak_memory_gib(), 3),
            "total_seconds": round(time.time() - started, 3),
        },
    )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / run_folder.CONFIG, config.to_yaml())
    write_whole(out / run_folder.FINGERPRINT, json.dumps(made_on, indent=1) + "\n")
    for when, answers in (("before", before), ("after", after)):
        for of, found in answers.items():
            run_folder.write_answers(out / of / f"{when}.jsonl", found)
    save_rows(out / run_folder.CHECKPOINTS / REHEARSAL, for_drift)
    save_adapter(model, out / run_folder.ADAPTER)
    if own:
        own.save_pretrained(out / run_folder.ADAPTER)
    write_report(out, report, events)
    return out


def _folder(adapter: str) -> Path:
    if Path(adapter).is_dir():
        return Path(adapter)
    if adapter.count("/") != 1 or adapter.startswith((".", "/")):
        raise InputError(f"{adapter}: no such adapter folder", "kdguard adopt FOLDER, or OWNER/NAME from the hub")
    try:
        return Path(snapshot_download(adapter, ignore_patterns=["checkpoint-*"]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{adapter}: this adapter is not on this machine and could not be fetched from the hub ({reason})",
            "check the id and the network, or name a folder",
        ) from None


def _refuse_trained_ends(model: PeftModel) -> None:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(isinstance(end, (LoraLayer, LoraEmbedding)) for end in ends):
        raise InputError(
            "this adapter has LoRA on the embeddings or the output head, which base and tuned have to share here",
            "train it on the layers between them",
        )

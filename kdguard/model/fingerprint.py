"""What a run depends on, as short strings: that it goes on, or is looked at, as what it was, and nothing else."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from kdguard import __version__
from kdguard.config import TuneConfig
from kdguard.data.rows import Rows
from kdguard.errors import InputError
from kdguard.events import Events
from kdguard.model.load import Base, compute_dtype, device, source
from kdguard.probes.packs import Probe
from kdguard.processes import count

LIBRARIES = "torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers"
# Paths are resolved when they are written down, what they lead to is looked at; the others change no step of a run.
_NOT_COMPARED = {"data", "model", "revision", "probes", "out", "preset"}
_NOT_COMPARED |= {"quant", "offload", "embeddings", "shorten", "report_to"}
_NOT_SHAPE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
_WORDS = {
    "weights": "the base's weights",
    "architecture": "the base's config.json",
    "tokenizer": "the tokenizer",
    "template": "the chat template",
    "data": "the training rows",
    "probes": "the probes",
    "quant": "the quantisation",
    "precision": "the precision",
}
_TENSORS, _PLACES, _BYTES = 2000, 4, 256  # sampled of a base; so many places of each tensor; so many bytes there
_SENTENCES = ("The  3 café's\n\tNaïve 1,000.5% — 你好 😀 ", " end\n")  # that tokenizers split differently


def fingerprint(config: TuneConfig, base: Base, rows: Rows, probes: Sequence[Probe]) -> dict[str, str]:
    """Everything that decides what a run of `config` learns from `rows`, and is asked, as a flat dict.

    `of_base`'s keys, and `data` (a hash of the tokenised rows), `probes`, `precision`, `processes` (each rounds its
    part of a step by itself), the libraries' versions under their names, and what decides the training under `--flag`.
    A second for a 7B base; a second more per 200 M tokens.
    """
    values = config.model_dump(mode="json", exclude=_NOT_COMPARED)
    flags = {
        f"--{key.replace('_', '-')}": value if isinstance(value, str) else json.dumps(value)
        for key, value in values.items()
    }
    return {
        **of_base(base),
        "data": _digest(_data(rows, base.tokenizer)),
        "probes": _digest(map(asdict, probes)),
        "precision": f"{str(compute_dtype()).removeprefix('torch.')} on {device().type}",
        "processes": str(count()),
        **versions(),
        **flags,
    }


def of_base(base: Base) -> dict[str, str]:
    """What an adapter was trained on: `of_files`, and `quant`."""
    return {**of_files(base.name, base.model.config, base.tokenizer), "quant": _quant(base.model)}


def of_files(name: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Of a base that need not be loaded: `weights`, `architecture`, `tokenizer` and `template`.

    The weights are sampled from the safetensors files, so it is the same on every device and in every quantisation.
    Where a hub's model has been converted elsewhere there are none beside its config, and `weights` is left out.
    """
    folder = _folder(name, config)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = {key: value for key, value in written.items() if key not in _NOT_SHAPE}
    files = _weight_files(folder)
    return {
        **({"weights": _digest(_weights(files))} if files else {}),
        "architecture": _digest([shape]),
        "tokenizer": _digest(_tokenizer(tokenizer)),
        "template": _digest([tokenizer.chat_template]),
    }


def versions() -> dict[str, str]:
    """Of kdguard and the libraries that train."""
    return {"kdguard": __version__} | {name: version(name) for name in LIBRARIES}


def changes(was: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """What differs, in words, such as `the quantisation (4bit nf4 then, 8bit now)`, by the keys that both have.

    A key that only one of them has is another version's of kdguard.
    """
    found = {}
    for key, then in was.items():
        if now.get(key, then) != then:
            hashed = key in ("weights", "architecture", "tokenizer", "template", "data", "probes")
            found[key] = _WORDS.get(key, key) + ("" if hashed else f" ({then} then, {now[key]} now)")
    return found


def read_fingerprint(path: Path) -> dict[str, str] | None:
    """The fingerprint that was written down; None where there is none, as of older runs."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): str(value) for key, value in found.items()}
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{path}: this file is damaged", "delete it to go on without comparing") from None


def refuse_other_base(path: Path, name: str, base: Mapping[str, str], events: Events | None = None) -> None:
    """Compare the base `name`, by `of_base` or `of_files`, with that of the run whose fingerprint is in `path`.

    Libraries of another version are worth a warning. Raises InputError for another base, tokenizer, chat template or
    quantisation, with which the adapter would answer what nobody trained it to.
    """
    was = read_fingerprint(path)
    if was is None:
        return
    if differs := changes(was, base):
        raise InputError(
            f"{name}: not what {path.parent} was trained on; other than then: {', '.join(differs.values())}",
            f"put back what was there then, or tune anew: kdguard tune --config {path.parent / 'config.yaml'}",
        )
    if events and (differs := changes(was, versions())):
        events.emit("warning", what=f"{path.parent} was trained with other versions: {', '.join(differs.values())}")


def _digest(parts: Iterable[Any]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return whole.hexdigest()


def _folder(name: str, config: PretrainedConfig) -> Path:
    name = source(name)
    if Path(name).is_dir():
        return Path(name)
    commit = getattr(config, "_commit_hash", None)
    return Path(cached_file(name, "config.json", revision=commit, local_files_only=True)).parent


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers loads: there may be the maker's own format beside them."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return sorted(folder.glob("*.safetensors"))


def _weights(files: Iterable[Path]) -> Iterator[Any]:
    """Name, type, shape and some bytes of each tensor, by name: however the tensors are spread over files."""
    tensors = {}
    for file in files:
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        header.pop("__metadata__", None)
        tensors |= {name: (file, 8 + size, told) for name, told in header.items()}
    every = -(-len(tensors) // _TENSORS)
    for name, (file, begin, told) in sorted(tensors.items())[::every]:
        first, last = told["data_offsets"]
        yield [name, told["dtype"], told["shape"]]
        with open(file, "rb") as opened:
            for place in range(_PLACES):
                opened.seek(begin + first + (last - first) * place // _PLACES)
                yield opened.read(min(_BYTES, (last - first) // _PLACES))


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
    """What it does, and not how a version of its library writes it down."""
    yield sorted(tokenizer.get_vocab().items())
    yield {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    yield [tokenizer(sentence)["input_ids"] for sentence in _SENTENCES]


def _data(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
    """Ids and targets in order; of conversations whose template writes the date, which is another one tomorrow, what
    was said in them."""
    dated = "strftime_now" in tokenizer.chat_template
    for batch in rows.table.to_batches():
        if dated:
            for example in batch["example"].to_pylist():
                messages, answers, _, muted = json.loads(example)
                yield [messages, answers, muted]
            batch = batch.filter(pc.equal(batch["format"], "text"))
        yield batch["length"].to_numpy().tobytes()
        yield batch["ids"].flatten().to_numpy().tobytes()
        yield batch["target"].flatten().to_numpy(zero_copy_only=False).tobytes()


def _quant(model: PreTrainedModel) -> str:
    """As it was loaded, whatever was asked for."""
    found = getattr(model.config, "quantization_config", None)
    if found is None:
        return "none"
    how = found if isinstance(found, dict) else found.to_dict()
    if how.get("load_in_4bit"):
        return f"4bit {how['bnb_4bit_quant_type']}{' double' if how['bnb_4bit_use_double_quant'] else ''}"
    return "8bit" if how.get("load_in_8bit") else str(how.get("quant_method"))

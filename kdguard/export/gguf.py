"""llama.cpp's own converters: where they are, what they are told, and the GGUF files that they write."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdguard.errors import InputError, KdguardError

CONVERT, CONVERT_LORA, QUANTIZE = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "llama-quantize"
BY_CONVERTER = ("f32", "f16", "bf16", "q8_0")  # what the converter writes itself
NAMED = Path(__file__).with_name("named_pre.py")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# How llama.cpp calls these ways of cutting a text before BPE. Its converter knows a tokenizer by what it makes of one
# text, so that one with a vocabulary of its own is unknown to it, even if its way of cutting is not.
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
}


@dataclass(frozen=True)
class LlamaCpp:
    """What was found of llama.cpp: its folder of converters, and the quantiser if there is one."""

    folder: Path
    quantizer: Path | None

    @property
    def version(self) -> str:
        """As far as it tells: the version of its GGUF library, and the quantiser's build."""
        project = self.folder / "gguf-py" / "pyproject.toml"
        gguf = re.search(r'^version = "(.+)"', project.read_text(encoding="utf-8"), re.M) if project.is_file() else None
        return f"gguf {gguf[1]}" if gguf else "unknown"

    def check(self, architecture: str, quantize: str) -> None:
        """Raises InputError when it cannot convert this architecture, or has no such type."""
        sources = [self.folder / CONVERT, *(self.folder / "conversion").glob("*.py")]
        if not any(f'"{architecture}"' in file.read_text(encoding="utf-8") for file in sources):
            raise InputError(
                f"{self.folder}: llama.cpp's converter does not know {architecture} ({self.version})",
                "a newer llama.cpp, or --to merged",
            )
        if quantize in BY_CONVERTER:
            return
        if self.quantizer is None:
            raise InputError(
                f"{self.folder}: found no {QUANTIZE} here, in build/bin or on PATH, which --quantize {quantize} needs",
                f"cmake -B build && cmake --build build --target {QUANTIZE}; or --quantize q8_0",
            )
        if not re.search(rf"\b{quantize}\b", _output([self.quantizer]), re.I):
            raise InputError(f"--quantize {quantize}: {QUANTIZE} has no such type", "--quantize q4_k_m")

    def convert(self, model: Path, file: Path, quantize: str, pre: str | None) -> None:
        """Write a model folder as GGUF. pre: see `pre_tokenizer`; quantize: a type that the converter writes itself."""
        script: list[Any] = [NAMED, pre, self.folder / CONVERT] if pre else [self.folder / CONVERT]
        _run([sys.executable, *script, model, "--outfile", file, "--outtype", quantize])

    def convert_lora(self, adapter: Path, base: Path, file: Path, outtype: str) -> None:
        """Write a plain LoRA as GGUF. base: a folder with the base's config.json."""
        options = ["--base", base, "--outfile", file, "--outtype", outtype]
        _run([sys.executable, self.folder / CONVERT_LORA, *options, adapter])

    def quantize(self, file: Path, to: Path, quantize: str) -> None:
        _run([self.quantizer, file, to, quantize.upper()])


def find(folder: Path | None = None) -> LlamaCpp | None:
    """llama.cpp in this folder, or by what is on PATH; None where it is not. Raises InputError for a wrong folder."""
    if folder is None:
        script = shutil.which(CONVERT)
        folder = Path(script).resolve().parent if script else None
    elif not (folder / CONVERT).is_file():
        raise InputError(
            f"{folder}: found no {CONVERT} in this folder", "--llama-cpp FOLDER, a checkout or source package of it"
        )
    if folder is None:
        return None
    places = [folder, folder / "build" / "bin", folder / "build" / "bin" / "Release", folder / "bin"]
    quantizer = next((found for place in places if (found := shutil.which(QUANTIZE, path=str(place)))), None)
    quantizer = quantizer or shutil.which(QUANTIZE)
    return LlamaCpp(folder, Path(quantizer) if quantizer else None)


def missing(run: Path, out: Path, weights: str, base: str, quantize: str, pre: str | None) -> InputError:
    """What to install, and the commands that do by hand what it would have done."""
    first = BY_CONVERTER[1] if quantize not in BY_CONVERTER else quantize
    file = out.with_name(f"{out.name}-{first}.gguf")
    kind = "merged" if weights == "merged" else "adapter"
    commands: list[list[Any]] = [["kdguard", "export", run, "--to", kind, "--out", out]]
    if weights == "merged":
        script = [NAMED, pre, CONVERT] if pre else [CONVERT]
        commands += [["python", *script, out, "--outfile", file, "--outtype", first]]
        if quantize not in BY_CONVERTER:
            commands += [[QUANTIZE, file, out.with_name(f"{out.name}-{quantize}.gguf"), quantize.upper()]]
    else:
        commands += [["python", CONVERT_LORA, "--base", base, "--outfile", file, "--outtype", first, out]]
    return InputError(
        f"llama.cpp is not here: no {CONVERT} on PATH, and no --llama-cpp FOLDER",
        "--llama-cpp FOLDER; or by hand: " + " && ".join(shlex.join(map(str, words)) for words in commands),
    )


def pre_tokenizer(tokenizer: Any) -> str | None:
    """What llama.cpp calls the way in which a tokenizer cuts text before BPE, if it is one of those known here."""
    if not tokenizer.is_fast:
        return None
    found = json.loads(tokenizer.backend_tokenizer.to_str())
    if found["model"]["type"] != "BPE" or found["normalizer"] or not found["pre_tokenizer"]:
        return None
    steps = found["pre_tokenizer"].get("pretokenizers", [found["pre_tokenizer"]])
    plain = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    return next((name for name, known in _PRE_TOKENIZERS.items() if plain == known), None)


def _output(command: list[Any]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, encoding="utf-8", errors="replace")
    return done.stdout + done.stderr


def _run(command: list[Any]) -> None:
    """Raises KdguardError with the last thing that it said, and the command, when it fails."""
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["it said nothing"]
        raise KdguardError(f"llama.cpp failed: {said[-1].strip()}", f"to see all of it: {shlex.join(words)}")

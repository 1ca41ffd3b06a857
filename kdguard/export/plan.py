"""What an export needs, looked up and checked before anything is loaded: programs, questions, the chat template."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import GenerationConfig

from kdguard.config import TuneConfig, resolve
from kdguard.events import Events
from kdguard.export import gguf, ollama
from kdguard.export.merge import precision
from kdguard.model.fingerprint import of_files, refuse_other_base
from kdguard.model.load import load_config, load_tokenizer, source
from kdguard.probes.packs import Probe
from kdguard.questions import Asked, asked_in
from kdguard.report import run as run_folder
from kdguard.report.run import Run

_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Wanted:
    """What to write: `kind` is merged, gguf, ollama or adapter.

    weights: merged, or the adapter alone, of GGUF and Ollama exports. quantize: a type of GGUF. base: what the
    Modelfile's FROM names where the adapter stands alone. questions: how many of each kind are asked at most.
    """

    kind: str
    out: Path
    weights: str = "merged"
    quantize: str | None = None
    llama_cpp: Path | None = None
    base: str | None = None
    questions: int | None = None


@dataclass(frozen=True)
class Plan:
    """A checked export.

    type: of the GGUF. own_type: the one in which the base is published. context: the tokens that the base has room for.
    old, new: the questions.
    """

    run: Run
    wanted: Wanted
    config: TuneConfig
    events: Events
    llama: gguf.LlamaCpp | None
    type: str
    own_type: str
    context: int | None
    questions: Asked
    old: list[Probe]
    new: list[Probe]

    @property
    def adapter(self) -> Path:
        return self.run.path / run_folder.ADAPTER

    @property
    def weights(self) -> str:
        return self.wanted.kind if self.wanted.kind in ("merged", "adapter") else self.wanted.weights

    @property
    def ends(self) -> list[int]:
        """The tokens that end a reply, by the chat template and by the base's makers."""
        try:
            made = GenerationConfig.from_pretrained(
                source(self.config.model), revision=self.config.revision
            ).eos_token_id
        except OSError:
            made = None
        more = made if isinstance(made, list) else [made] if made is not None else []
        return list(dict.fromkeys([self.questions.renderer.end_of_turn, *more]))

    def base_folder(self) -> Path:
        """The base's own files."""
        path = Path(source(self.config.model))
        return path if path.is_dir() else Path(snapshot_download(self.config.model, revision=self.config.revision))


def prepare(run: Run, wanted: Wanted, events: Events) -> Plan:
    """Raises InputError for whatever would be in the way later."""
    run_folder.refuse_used(wanted.out, "give another --out")
    config = resolve({}, run.path / run_folder.CONFIG)
    model = load_config(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    architecture = (model.architectures or ["an unknown architecture"])[0]
    own_type = _TYPES[str(precision(config.model, config.revision)).removeprefix("torch.")]
    type_ = wanted.quantize or own_type
    llama = None
    if wanted.kind in ("gguf", "ollama"):
        llama = gguf.find(wanted.llama_cpp)
        if llama:
            llama.check(architecture, type_)
        elif wanted.kind == "gguf" or wanted.quantize:
            pre = gguf.pre_tokenizer(load_tokenizer(config.model, config.revision))
            raise gguf.missing(run.path, wanted.out, wanted.weights, source(config.model), type_, pre)
    if wanted.kind == "ollama":
        ollama.check(architecture, gguf=llama is not None, weights=wanted.weights)
    asked = asked_in(run, config, events)
    files = of_files(config.model, model, asked.renderer.tokenizer)
    refuse_other_base(run.path / run_folder.FINGERPRINT, config.model, files, events)
    if wanted.kind == "ollama":
        ollama.template_of(asked.renderer)
    context = getattr(model.get_text_config(), "max_position_embeddings", None)
    old = _some([asked.probes[pair.before.id] for pair in run.probes], wanted.questions, config.seed)
    new = _some(asked.new, wanted.questions, config.seed)
    return Plan(run, wanted, config, events, llama, type_, own_type, context, asked, old, new)


def _some(questions: Sequence[Probe], most: int | None, seed: int) -> list[Probe]:
    if most is None or most >= len(questions):
        return list(questions)
    places = sorted(random.Random(seed).sample(range(len(questions)), most))
    return [questions[place] for place in places]

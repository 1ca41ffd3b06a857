"""Models and adapters that may be anybody's: no code, no pickles, nothing outside their folder; and what to say."""

import json
import shlex
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from kdguard.errors import InputError

INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

# What transformers raises for a config or weights that are not what they should be.
BROKEN = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    RecursionError,
    SafetensorError,
    StrictDataclassError,
)


def refuse_links_out(folder: Path) -> None:
    """Raise InputError for a link in a folder that leads out of it; those of the hub's cache lead to its blobs."""
    root = folder.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise InputError(f"{path}: found a link that leads out of its folder", "put the file itself there")


def check_weights(folder: Path) -> None:
    """Raise InputError for a model's folder without weights in safetensors, or whose index leads elsewhere."""
    if (folder / "adapter_config.json").is_file():  # transformers would put it on the base
        raise InputError(f"{folder}: found an adapter in this folder, expected a model", f"kdguard adopt {folder}")
    if not list(folder.glob("*.safetensors")):
        if pickled := next((file for pattern in _PICKLES for file in sorted(folder.glob(pattern))), None):
            code = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(folder)!r})"
            raise InputError(
                f"{folder}: found only pickled weights ({pickled.name}), which can run code; expected *.safetensors",
                f"if you trust them: python -c {shlex.quote(code + f'.save_pretrained({str(folder)!r})')}",
            )
        raise InputError(
            f"{folder}: found no weights (*.safetensors) in this folder", "download or save the whole model there"
        )
    index = folder / INDEX
    if not index.is_file():
        return
    try:
        shards = set(map(str, json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{index}: found no index of weights", "download or save the whole model again") from None
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise InputError(
                f"{index}: found the file {shard[:100]!r}, expected *.safetensors beside it", "save it again"
            )


def code_needed(name: str) -> InputError:
    """What to say of a model that comes with code."""
    return InputError(
        f"{name}: this model cannot be loaded without running the Python code that comes with it",
        "--trust-remote-code, once you have read that code; or a model that transformers knows: kdguard presets",
    )


def ask_hub(name: str, revision: str | None) -> None:
    """Tell at once when the hub cannot be reached or has no such model: the downloads themselves retry for a minute."""
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except Exception as error:  # whatever the hub's HTTP library raises in this version
        raise unloadable(name, error) from None


def unloadable(name: str, error: Exception) -> InputError:
    """What to say of a model that cannot be loaded."""
    if "trust_remote_code" in str(error):
        return code_needed(name)
    reason = (str(error).strip() or type(error).__name__).split("\n")[0]
    if not Path(name).is_dir() and "/" in name:
        return InputError(
            f"{name}: this model is not on this machine and could not be fetched from the hub ({reason})",
            "check the id and the network; gated models need `hf auth login`; a local folder works too",
        )
    return InputError(f"{name}: this model could not be loaded ({reason})", "--model FOLDER, OWNER/NAME or demo")

"""What the tests share: the embedded model, tiny models of every architecture with their own tokenizer, a browser."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from kdguard.data.tokens import Renderer
from kdguard.model.load import Base, load_base

ROOT = Path(__file__).parent.parent
SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "<end>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ 'assistant' if m.role == 'assistant' else 'user' }}>{{ m.content }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SMALL = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ARCHITECTURES = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "phi3": Phi3Config,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, a BOS and control tokens in its template: what a real chat tokenizer has, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny("qwen3")` -> the folder of a tiny, randomly initialised model of that architecture; `layers` if not 2."""
    made: dict[tuple[str, int], Path] = {}

    def make(architecture: str, layers: int = 2) -> Path:
        if (architecture, layers) not in made:
            torch.manual_seed(0)
            tokenizer = byte_tokenizer()
            folder = tmp_path_factory.mktemp(architecture)
            shape = SMALL | {"num_hidden_layers": layers}
            config = ARCHITECTURES[architecture](**shape, vocab_size=len(tokenizer))
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[architecture, layers] = folder
        return made[architecture, layers]

    return make


@pytest.fixture
def demo() -> Base:
    """The embedded model behind a 4-bit base, fresh for each test that trains on it."""
    return load_base("demo")


@pytest.fixture
def renderer(demo: Base) -> Renderer:
    return Renderer(demo.tokenizer)


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """Debian's Chromium; its own calls home reach nobody."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("there is no Chromium")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium) -> Iterator[Callable]:
    """`browse(address, width, scheme)`: a page, and what is wrong with it, as it happens: errors, whatever breaks its
    policy, dialogs, and requests to anywhere but `allowed`.
    """
    contexts = []

    def open_it(address: str, width: int = 1440, scheme: str = "light", allowed: str = ""):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        wrong: list[str] = []

        def asked(request) -> None:
            if not request.url.startswith((allowed or address, "data:", "blob:")):
                wrong.append(f"asked {request.url}")

        page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", asked)
        page.goto(address)
        return page, wrong

    yield open_it
    for context in contexts:
        context.close()

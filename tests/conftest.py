"""What the tests share: the embedded model, and tiny models of every architecture with their own tokenizer."""

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
    """`tiny("qwen3")` -> the folder of a tiny, randomly initialised model of that architecture."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            torch.manual_seed(0)
            tokenizer = byte_tokenizer()
            folder = tmp_path_factory.mktemp(architecture)
            config = ARCHITECTURES[architecture](**SMALL, vocab_size=len(tokenizer))
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[architecture] = folder
        return made[architecture]

    return make


@pytest.fixture
def demo() -> Base:
    """The embedded model behind a 4-bit base, fresh for each test that trains on it."""
    return load_base("demo")


@pytest.fixture
def renderer(demo: Base) -> Renderer:
    return Renderer(demo.tokenizer)

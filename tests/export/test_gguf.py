"""A GGUF by llama.cpp's own converters, asked through llama-cpp-python, answers as the tuned model does."""

import json

import pytest

from kdguard.data.tokens import Renderer
from kdguard.export import gguf
from kdguard.model.load import load_tokenizer
from kdguard.probes.packs import load_probes
from tests.conftest import byte_tokenizer
from tests.data.test_templates import byte_level
from tests.export.test_export import exported


def test_a_way_of_cutting_text_has_llama_cpps_name_only_where_it_is_that_one():
    assert gguf.pre_tokenizer(load_tokenizer("demo")) == "smollm"
    assert gguf.pre_tokenizer(byte_tokenizer()) == "gpt-2"
    assert gguf.pre_tokenizer(byte_level("qwen2_5", merges=False)) is None


@pytest.mark.parametrize(
    ("flags", "least"),
    [
        (["--to", "gguf"], 0.99),
        (["--to", "ollama", "--quantize", "q8_0"], 0.95),
        (["--to", "gguf", "--weights", "adapter"], 0.9),  # on the 16-bit base, not on the one it was trained on
    ],
)
def test_it_answers_as_the_tuned_model(run, tmp_path, llama_cpp, flags, least):
    done, entry = exported(run, *flags, "--llama-cpp", llama_cpp, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert entry["runtime"].startswith("llama-cpp-python")
    same, n = (sum(each[key] for each in entry["same"].values()) for key in ("count", "n"))
    assert same >= least * n > 100, entry["same"]
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert file.name.startswith("run-") and json.dumps(entry["type"])[1:-1] in file.name
    if "ollama" in flags:
        assert f"FROM ./{file.name}\n" in (tmp_path / "out" / "Modelfile").read_text()


def test_llama_cpp_makes_the_same_tokens(tmp_path, llama_cpp):
    """Of every shipped probe, in the embedded model's own vocabulary."""
    from llama_cpp import Llama

    tokenizer = load_tokenizer("demo")
    renderer = Renderer(tokenizer)
    found = gguf.find(llama_cpp)
    found.convert(tokenizer.name_or_path, tmp_path / "demo.gguf", "f16", gguf.pre_tokenizer(tokenizer))
    llm = Llama(str(tmp_path / "demo.gguf"), vocab_only=True, verbose=False)
    for probe in load_probes(["world", "common"]):
        text = renderer.prompt_text(probe.asked).encode()
        assert llm.tokenize(text, add_bos=False, special=True) == renderer.ids(probe.asked, prompt=True)
    llm.close()


def test_what_llama_cpp_does_not_know_is_said_before(llama_cpp):
    found = gguf.find(llama_cpp)
    found.check("Qwen2ForCausalLM", "f16")
    with pytest.raises(gguf.InputError, match="does not know NoForCausalLM"):
        found.check("NoForCausalLM", "f16")

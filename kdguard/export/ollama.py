"""A Modelfile for Ollama: its TEMPLATE is what the chat template writes around marked messages."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from kdguard.data.tokens import Renderer
from kdguard.errors import InputError

# What Ollama's convert.go turns into GGUF by itself; of other architectures it needs GGUF files.
READS = (
    *("LlamaForCausalLM", "MixtralForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    *("Phi3ForCausalLM", "Qwen2ForCausalLM", "Olmo3ForCausalLM", "CohereForCausalLM"),
)
READS_ADAPTERS = ("LlamaForCausalLM", "Gemma2ForCausalLM")
CONTEXT = 4096  # tokens that Ollama gives a model unless it is told otherwise
_SYSTEM, _USER, _ANSWER = (f"\u2042{letter}\u2042" for letter in "suA")


@dataclass(frozen=True)
class Template:
    """What a chat template writes around the turns of a conversation.

    `before_system` and `after_system` stand around the system's text, before the first user's text, or before the last
    one if `system_last`; `begin` is before the first user's text where there is no system turn.
    """

    begin: str
    answer: str  # between a user's text and an answer to it that was given
    between: str  # between an answer and the next user's text
    opening: str  # after the last user's text: here the model goes on
    before_system: str
    after_system: str
    system_last: bool = False

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation, up to the assistant's turn, as the Go template renders it."""
        system = "\n\n".join(turn["content"] for turn in messages if turn["role"] == "system")
        told = [turn for turn in messages if turn["role"] != "system"]
        text = ""
        for place, turn in enumerate(told):
            if turn["role"] == "user":
                here = system and place == (len(told) - 1 if self.system_last else 0)
                if here and not self.system_last:
                    text += self.before_system + system + self.after_system
                else:
                    text += self.between if place else self.begin
                    text += system + self.after_system if here else ""
            text += turn["content"]
            if turn["role"] == "user":
                text += self.opening if place == len(told) - 1 else self.answer
        return text

    def go(self) -> str:
        """The same as a template of Go's, over Ollama's .System and .Messages."""
        begin, answer, between, opening, before, after = map(
            _go_text,
            (self.begin, self.answer, self.between, self.opening, self.before_system, self.after_system),
        )
        last = "(eq (len (slice $.Messages $i)) 1)"
        if self.system_last:
            user = f"{{{{ if le $i 1 }}}}{begin}{{{{ else }}}}{between}{{{{ end }}}}"
            user += f"{{{{ if and $.System {last} }}}}{{{{ $.System }}}}{after}{{{{ end }}}}"
        else:
            first = f"{{{{ if $.System }}}}{before}{{{{ $.System }}}}{after}{{{{ else }}}}{begin}{{{{ end }}}}"
            user = f"{{{{ if le $i 1 }}}}{first}{{{{ else }}}}{between}{{{{ end }}}}"
        return (
            f'{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "user" }}}}{user}{{{{ .Content }}}}'
            f"{{{{ if {last} }}}}{opening}{{{{ else }}}}{answer}{{{{ end }}}}"
            f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{{{{ end }}}}{{{{ end }}}}'
        )


def template_of(renderer: Renderer) -> Template:
    """The tokenizer's chat template as one for Ollama, which puts a BOS before it where the tokenizer does.

    A system turn that the chat template refuses stands before the first user's text.

    Raises InputError when its conversations are not made of these pieces.
    """
    tokenizer = renderer.tokenizer
    bos = tokenizer.bos_token or ""
    adds_bos = bool(bos) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

    def text(*turns: tuple[str, str]) -> str:
        written = renderer.prompt_text([{"role": role, "content": content} for role, content in turns])
        return written.removeprefix(bos) if adds_bos else written

    system, user, answer = ("system", _SYSTEM), ("user", _USER), ("assistant", _ANSWER)
    refused = InputError(
        "the chat template of this model is not one that Ollama's TEMPLATE can say",
        "--to gguf, whose file carries the chat template itself",
    )
    try:
        begin, answered, opening = text(user, answer, user).split(_USER)
        given, between = answered.split(_ANSWER)
    except ValueError:
        raise refused from None
    try:
        before, rest = text(system, user).split(_SYSTEM)
        after = rest.split(_USER)[0]
        told: tuple[tuple[str, str], ...] = (system,)
    except (TemplateError, ValueError):
        before, after, told = begin, "\n\n", ()
    for system_last in (False, True):
        found = Template(begin, given, between, opening, before, after, system_last)
        talks = [told + (user, answer) * n + (user,) for n in range(3)] + [(user, answer, user)]
        if all(found.render([{"role": r, "content": c} for r, c in talk]) == text(*talk) for talk in talks):
            return found
    raise refused


def modelfile(
    source: str,
    renderer: Renderer,
    *,
    adapter: str | None,
    ends: Iterable[int],
    context: int | None,
    said: Sequence[str],
) -> str:
    """The Modelfile. source: what FROM names. context: the tokens that the model has room for. said: comments."""
    stops = dict.fromkeys(str(renderer.tokenizer.decode([token])) for token in ends)
    lines = [f"# {' '.join(line.split())}" for line in said] + [f"FROM {source}"]
    if adapter:
        lines += [f"ADAPTER {adapter}"]
    lines += [f'TEMPLATE """{template_of(renderer).go()}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops if stop.strip()]
    # As the questions were asked: greedily, and without a penalty on words that come again.
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    if context and context < CONTEXT:
        lines += [f"PARAMETER num_ctx {context}"]
    return "\n".join(lines) + "\n"


def check(architecture: str, *, gguf: bool, weights: str) -> None:
    """Raises InputError, before anything is loaded, when Ollama cannot import what would be written."""
    if gguf or architecture in (READS if weights == "merged" else READS_ADAPTERS):
        return
    needed: dict[str, Any] = {
        "merged": ("weights", "--llama-cpp FOLDER, so that they are written as GGUF"),
        "adapter": ("adapters", "--weights merged; or --llama-cpp FOLDER, so that it is written as GGUF"),
    }
    what, hint = needed[weights]
    raise InputError(f"Ollama cannot import safetensors {what} of {architecture}", hint)


def _go_text(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')

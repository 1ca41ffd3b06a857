"""Targets are the assistant's text and the end of its turn, nothing else: a wrong mask trains nothing, silently."""

import pytest

from kdguard.data import IGNORE
from kdguard.data.batches import Collator
from kdguard.data.formats import Example
from kdguard.data.tokens import CHATML, Renderer, Row, with_chat_template
from kdguard.errors import InputError
from tests.conftest import byte_tokenizer


@pytest.fixture
def bytes_renderer() -> Renderer:
    return Renderer(byte_tokenizer())


def example(*turns: str) -> Example:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns))
    return Example(messages, (turns[-1],), "file:1")


def targets(renderer: Renderer, row: Row) -> str:
    return renderer.tokenizer.decode([label for label in row.labels if label != IGNORE])


def test_targets_are_every_answer_with_its_end(bytes_renderer):
    row = bytes_renderer.row(example("Hi?", "Hello.", "And?", "Bye."), 512)
    assert targets(bytes_renderer, row) == "Hello.<end>Bye.<end>"


def test_one_beginning_of_sequence(bytes_renderer):
    """The template writes BOS; a tokenizer that adds another teaches the model a prompt nobody will send."""
    row = bytes_renderer.row(example("Hi?", "Hello."), 512)
    assert row.ids.count(bytes_renderer.tokenizer.bos_token_id) == 1
    assert row.ids[0] == bytes_renderer.tokenizer.bos_token_id


def test_the_prompt_asked_is_the_prompt_trained(bytes_renderer):
    row = bytes_renderer.row(example("Hi?", "Hello."), 512)
    prompt = bytes_renderer.prompt("Hi?")
    assert row.ids[: len(prompt)] == prompt
    assert set(row.labels[: len(prompt)]) == {IGNORE}
    assert IGNORE not in row.labels[len(prompt) :]


def test_a_long_row_loses_prompt_and_keeps_its_answer(bytes_renderer):
    row = bytes_renderer.row(example("x" * 100, "Hello."), 20)
    assert len(row.ids) == len(row.labels) == 20
    assert targets(bytes_renderer, row) == "Hello.<end>"


def test_an_answer_that_does_not_fit_is_refused(bytes_renderer):
    """Cut off, it would never learn to end; left out silently, the run would train on less than it says."""
    with pytest.raises(InputError, match=r"file:1: found an answer of 31 tokens, expected at most 15 of 20"):
        bytes_renderer.row(example("Hi?", "x" * 30), 20)


def test_an_earlier_turn_that_is_opened_without_the_empty_thought_is_a_target(bytes_renderer):
    """Templates of reasoning models ask with an empty thought, and write none before turns that are past."""
    bytes_renderer.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<end>{% endif %}"
        "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant><end>{% endif %}"
    )
    renderer = Renderer(bytes_renderer.tokenizer)
    assert targets(renderer, renderer.row(example("Hi?", "Hello.", "And?", "Bye."), 512)) == "Hello.<end>Bye.<end>"


@pytest.mark.parametrize("opened", ["<think>", "<think>\n"])
@pytest.mark.parametrize("written", ["", "<think>\n\n</think>\n\n"])
def test_a_thought_that_the_template_opens_when_it_asks_is_closed_at_once(bytes_renderer, opened, written):
    """Else nothing asked could be trained, or every answer to a probe would be the beginning of a thought."""
    bytes_renderer.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'assistant' and loop.last %}" + written + "{% endif %}{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>" + opened + "{% endif %}"
    )
    renderer = Renderer(bytes_renderer.tokenizer)
    prompt = renderer.prompt("Hi?")
    assert renderer.tokenizer.decode(prompt) == "<user>Hi?<end><assistant><think>\n\n</think>\n\n"
    assert renderer.row(example("Hi?", "Hello."), 512).ids[: len(prompt)] == prompt
    row = renderer.row(example("Hi?", "Hello.", "And?", "Bye."), 512)
    assert targets(renderer, row) == "Hello.<end>Bye.<end>"
    assert renderer.tokenizer.decode(row.ids).count("<think>") == 1


@pytest.mark.parametrize(
    "earlier",
    [
        pytest.param("", id="left out"),
        pytest.param("<assistant>...<end>", id="rewritten"),
        pytest.param("<assistant>{{ m.content }}", id="not ended"),
    ],
)
def test_an_earlier_turn_that_cannot_be_found_is_context(bytes_renderer, earlier):
    """What the template does not write is not taught, and no target reaches on into the next user's turn."""
    bytes_renderer.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}<{{ m.role }}>{{ m.content }}<end>"
        "{% else %}" + earlier + "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    renderer = Renderer(bytes_renderer.tokenizer)
    assert targets(renderer, renderer.row(example("Hello.", "Hello.", "Hello.", "Bye."), 512)) == "Bye.<end>"


def test_a_template_without_an_end_of_turn_gets_the_end_of_text(bytes_renderer):
    """Nothing else would teach the model to stop. An earlier turn without an end is context."""
    bytes_renderer.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    renderer = Renderer(bytes_renderer.tokenizer)
    row = renderer.row(example("user: Hi", "assistant", "\n", "assistant: \nuser: "), 512)
    assert targets(renderer, row) == "assistant: \nuser: \n</s>"


def test_turns_in_another_order(bytes_renderer):
    """A greeting answers nobody; of two answers in a row each is one."""
    roles = ("assistant", "user", "assistant", "assistant")
    turns = tuple({"role": role, "content": text} for role, text in zip(roles, "abcd", strict=True))
    row = bytes_renderer.row(Example(turns, ("d",), "file:1"), 512)
    assert targets(bytes_renderer, row) == "c<end>d<end>"
    assert targets(bytes_renderer, bytes_renderer.row(Example(turns, ("d",), "file:1", (3,)), 512)) == "c<end>"
    with pytest.raises(InputError, match="file:1: found no turn of the assistant that can be trained"):
        bytes_renderer.row(Example(turns[:2], ("a",), "file:1"), 512)


def test_the_only_turn_that_is_taught_survives_the_cut(bytes_renderer):
    """The muted turns after it go first: with the first exchange cut off, nothing would be left to teach."""
    muted = example("x" * 50, "Hello.", "And?" * 50, "Bye.")
    row = bytes_renderer.row(Example(muted.messages, ("Bye.",), "file:1", (3,)), 40)
    assert targets(bytes_renderer, row) == "Hello.<end>"
    assert len(row.ids) == 40


def test_a_template_whose_prompt_is_no_prefix_is_refused(bytes_renderer):
    bytes_renderer.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with pytest.raises(InputError, match="file:1: the chat template"):
        bytes_renderer.row(example("Hi?", "Hello."), 512)


def test_the_user_turn_that_the_base_writes_itself(bytes_renderer):
    """Prefix, question and ending make the same ids as the template: the base rehearses in the format it is used in."""
    question = bytes_renderer.tokenizer("Hi?", add_special_tokens=False)["input_ids"]
    assert bytes_renderer.user_prefix() + question + bytes_renderer.after_user_turn() == bytes_renderer.prompt("Hi?")


def test_a_base_model_gets_chatml_and_ends_with_its_own_token():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    renderer = Renderer(with_chat_template(tokenizer))
    assert tokenizer.chat_template == CHATML
    assert targets(renderer, renderer.row(example("Hi?", "Hello."), 512)) == "Hello.</s>"


def test_padding_is_never_a_target_or_seen():
    batch = Collator(pad=7)([Row([1, 2, 3], [IGNORE, 2, 3]), Row([7], [7])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [7, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3], [7, IGNORE, IGNORE]]


def test_an_end_of_turn_after_a_space_is_the_token_not_the_space(bytes_renderer):
    """Templates such as Llama 2's put a space before the end: taken for it, it would cut answers at a word."""
    bytes_renderer.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    renderer = Renderer(bytes_renderer.tokenizer)
    assert renderer.end_of_turn == renderer.tokenizer.eos_token_id
    assert targets(renderer, renderer.row(example("Hi?", "a b 7"), 512)) == " a b 7 </s>"


def test_a_conversation_that_the_template_refuses_names_its_row(bytes_renderer):
    bytes_renderer.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + bytes_renderer.tokenizer.chat_template
    )
    turns = ({"role": "system", "content": "Be kind."}, *example("Hi?", "Hello.").messages)
    with pytest.raises(InputError, match=r"file:1: the chat template refuses this conversation \(no system turn\)"):
        bytes_renderer.row(Example(turns, ("Hello.",), "file:1"), 512)

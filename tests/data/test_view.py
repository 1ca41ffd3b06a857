"""What people are shown of a row is what is trained: every token once, each as what it is."""

from itertools import groupby

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from kdguard.data import IGNORE
from kdguard.data.formats import Example
from kdguard.data.tokens import TARGET, TEMPLATE, TEXT, Renderer, Row
from kdguard.data.view import Token, runs, tokens, visible
from kdguard.model.load import load_tokenizer
from tests.conftest import SPECIAL, byte_tokenizer
from tests.conftest import TEMPLATE as CHAT

SYSTEM = "assistant"  # stands in templates too
ASKED = "  Was ist <end>, <|end|> and <|im_end|>?\n\n\tfin \U0001f44b\U0001f3fd"
TURNS = [
    ("system", SYSTEM),
    ("user", ASKED),
    ("assistant", "Ein Ende.  "),
    ("user", "नमस्ते, \u202eמה? e\u0301"),
    ("assistant", " 日本 👨‍👩‍👧\r\n"),
]


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's: spaces are letters, the first one is its own, and what it does not know is bytes."""
    letters = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocabulary = {token: number for number, token in enumerate([*letters, "▁E", "in"])}
    merges = [("▁", "E"), ("i", "n")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )


@pytest.fixture(params=["bytes", "demo", "sentencepiece"])
def renderer(request) -> Renderer:
    made = {"bytes": byte_tokenizer, "demo": lambda: load_tokenizer("demo"), "sentencepiece": sentencepiece}
    return Renderer(made[request.param]())


def example(turns=TURNS, muted: tuple[int, ...] = ()) -> Example:
    messages = tuple({"role": role, "content": text} for role, text in turns)
    return Example(messages, (turns[-1][1],), "file:1", muted)


def parts(row: list[Token]) -> list[tuple[str, str]]:
    return [(kind, "".join(token.text for token in run)) for kind, run in groupby(row, lambda token: token.kind)]


def words(row: list[Token], kind: str) -> list[str]:
    return [text for this, text in parts(row) if this == kind]


def read(renderer: Renderer, row: Row) -> list[str]:
    """People's words, without the space that some tokenizers put before what follows a control token."""
    before = " " if "Prepend" in str(renderer.tokenizer.backend_tokenizer.normalizer) else ""
    return [text.removeprefix(before) for text in words(tokens(renderer, row), TEXT)]


@pytest.mark.parametrize("muted", [(), (2,)])
def test_every_token_is_shown_once_as_what_it_is(renderer, muted):
    """The words of each turn are known, so what is neither those nor a target is the template's."""
    row = renderer.row(example(muted=muted), 2048)
    shown = tokens(renderer, row)
    assert [token.id for token in shown] == row.ids
    assert [token.kind == TARGET for token in shown] == [label != IGNORE for label in row.labels]
    end = renderer.tokenizer.decode([renderer.end_of_turn])
    taught = [text + end for place, (role, text) in enumerate(TURNS) if role == "assistant" and place not in muted]
    assert words(shown, TARGET) == taught
    assert read(renderer, row) == [
        text for place, (role, text) in enumerate(TURNS) if role != "assistant" or place in muted
    ]
    template = "".join(words(shown, TEMPLATE))
    assert template and not any(letter in template for letter in "?हמ日\n")
    assert "".join(token.text for token in shown).endswith(taught[-1])


def test_the_pieces_that_are_shown_are_the_tokens_of_the_row(renderer):
    row = renderer.row(example(), 2048)
    pieces = [piece for _, run in runs(tokens(renderer, row)) for piece in run]
    assert [number for piece in pieces for number in piece.ids] == row.ids
    text = "".join(text for piece in pieces for text, sign in piece.fragments if not sign)
    assert "\N{REPLACEMENT CHARACTER}" not in text and "👨‍👩‍👧" in text and "नमस्ते" in text
    (hand,) = [piece for piece in pieces if piece.fragments == [("\U0001f44b", False)]]
    assert len(hand.ids) == 4


def test_a_row_that_was_cut_shows_what_is_left(renderer):
    whole = renderer.row(example(), 2048)
    row = renderer.row(example(), len(whole.ids) - 20)
    assert row.cut and read(renderer, row) == [SYSTEM, TURNS[3][1]]
    long = [("user", "x" * 400), ("assistant", "y")]
    (left,) = read(renderer, renderer.row(example(long), 100))
    assert set(left) == {"x"} and len(left) < 100


def test_a_prompt_that_ends_with_a_space_is_the_template_s(renderer):
    """The answer is tokenised apart there, for as a whole its first token would hold the space too."""
    tokenizer = renderer.tokenizer
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    renderer = Renderer(tokenizer)
    shown = tokens(renderer, renderer.row(example([("user", " user: "), ("assistant", "Ein")]), 512))
    assert words(shown, TEXT) in (["user:"], [" user:"])  # with the space where that is one token
    assert words(shown, TARGET) == ["Ein" + tokenizer.eos_token]


def test_of_an_earlier_answer_what_the_template_leaves_of_it_is_text(renderer):
    """Templates of reasoning models leave out what was thought."""
    renderer.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content.split('</think>')[-1].strip() }}"
        "<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [("user", "a"), ("assistant", "<think>x</think>\n\n b"), ("user", "c"), ("assistant", "d")]
    renderer = Renderer(renderer.tokenizer)
    assert read(renderer, renderer.row(example(turns, muted=(1,)), 512)) == ["a", "b", "c"]


def test_a_character_that_two_rows_share_is_shown_as_bytes():
    renderer = Renderer(byte_tokenizer())
    example = Example((), (), "file:1", text="ab\U0001f34e")
    shown = [tokens(renderer, row) for _, row in renderer.rows([example], 5)]
    assert [parts(row) for row in shown] == [
        [(TEMPLATE, "<s>"), (TARGET, "ab<0xF0><0x9F>")],
        [(TEMPLATE, "<s>"), (TARGET, "<0x8D><0x8E></s>")],
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        (" a  ", "·a··"),
        ("a \n\n b", "a·⏎\n⏎\n b"),
        ("a \r\n\tb", "a·\\r⏎\n→\tb"),
        ("\x1b[2J\x07\x9b", "\\x1b[2J\\x07\\x9b"),
        ("\u202eab\u2066\u200b\u2028\ufeff", "\\u202eab\\u2066\\u200b\\u2028\\ufeff"),
        ("می\u200cخواهم 👨\u200d👩", "می\u200cخواهم 👨\u200d👩"),
    ],
)
def test_what_cannot_be_seen_is_shown_by_a_sign(text, shown):
    """A token a letter: what is at an edge is told by the run, not by its tokens."""
    ((kind, pieces),) = runs([Token(0, letter, TEXT) for letter in text])
    assert kind == TEXT
    assert "".join(part for piece in pieces for part, _ in piece.fragments) == shown
    row = [
        Token(0, "  ", TARGET),
        Token(1, "a ", TARGET),
        Token(2, "<end>", TARGET, control=True),
        Token(0, " ", TARGET),
    ]
    ((_, pieces),) = runs(row)
    assert "".join(part for piece in pieces for part, _ in piece.fragments) == "··a·<end>·"
    assert visible("\x1b[1m") == "\\x1b[1m"

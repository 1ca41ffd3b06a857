"""Whatever people write, in every published template: the targets are their answers with the end, and nothing else."""

from functools import cache
from itertools import groupby
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
import trl
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from kdguard.data import IGNORE
from kdguard.data.formats import Example
from kdguard.data.tokens import Renderer, Row, with_chat_template
from kdguard.errors import InputError

PUBLISHED = Path(trl.__file__).parent / "chat_templates"
MISTRAL = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"

# What each model's tokenizer adds: its BOS, its end of turn, its other control tokens ("+": whitespace after them is
# theirs), and added tokens that are not special.
MODELS = {
    "llama3_1": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"], []),
    "qwen2_5": ("", "<|im_end|>", ["<|endoftext|>", "<|im_start|>"], ["<tool_call>", "</tool_call>"]),
    "qwen3": ("", "<|im_end|>", ["<|endoftext|>", "<|im_start|>"], ["<think>", "</think>", "<tool_response>"]),
    "gemma3": ("<bos>", "<end_of_turn>", ["<eos>", "<start_of_turn>"], ["\n\n", "  "]),
    "phi3": ("<s>", "<|end|>+", ["<|endoftext|>", "<|assistant|>+", "<|user|>+", "<|system|>+"], []),
    "deepseek_r1_distill": (
        *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", []),
        ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"],
    ),
    "chatml": ("", "<|endoftext|>", [], []),
    "chatml after BOS": ("<s>", "</s>", [], []),
}
THINKING = ("qwen3", "deepseek_r1_distill")
# Qwen's and Llama's: line breaks after a full stop, and several in a row, are one token
WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROSE = "Hello there.\n\nWhat is it?\n It is the answer.\n\n\n- one\n- two  and\nassistant\nuser\n" * 20
CONTROL = [name.rstrip("+") for bos, end, *others in MODELS.values() for name in [bos, end, *others[0], *others[1]]]
PIECES = [
    *dict.fromkeys(name for name in CONTROL if name.strip() and "▁" not in name),
    *("[INST]", "[/INST]", "</think>", "<|im_start|>assistant\n", "<|im_end|>\n", "assistant\n", "user", "Hello", "."),
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        ".\n",
        "\t",
        "🙂",
        "👩‍👩‍👧",
        "שלום",
        "漢字",
        "e\u0301",
        "\ue000",
        "\U0010fffd",
        "⁂",
        "⁃",
    ),
]
# U+2581 is SentencePiece's own space; U+F0000 and U+F0001 are how transformers marks control tokens
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\U000f0000\U000f0001")
texts = st.lists(st.sampled_from(PIECES) | st.text(characters, max_size=3), min_size=1, max_size=5).map("".join)
said = texts.filter(str.strip)  # what formats.py lets through
exchanges = st.lists(st.tuples(said, said), min_size=1, max_size=4)
check = settings(
    derandomize=True, deadline=None, max_examples=25, database=None, suppress_health_check=list(HealthCheck)
)


def byte_level(model: str, merges: bool) -> PreTrainedTokenizerFast:
    bos, end, special, added = MODELS[model]
    names = [name for name in [bos, end, *special] if name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 256 + (100 if merges else 0)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([PROSE], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(name.rstrip("+"), rstrip=name.endswith("+"), special=True, normalized=False) for name in names]
    )
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    eos = "<|endoftext|>" if model == "phi3" else end
    template = None if model.startswith("chatml") else (PUBLISHED / f"{model}.jinja").read_text(encoding="utf-8")
    return with_chat_template(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=bos or None, eos_token=eos, chat_template=template
        )
    )


def mistral() -> PreTrainedTokenizerFast:
    """Mistral's own SentencePiece model, as transformers converts it (its converter needs protobuf)."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(MISTRAL))
    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    control = [piece for piece, i in vocabulary.items() if pieces.is_control(i)]
    merges = sorted(
        (-pieces.get_score(i), cut, piece)
        for piece, i in vocabulary.items()
        if not pieces.is_control(i) and not pieces.is_byte(i)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    )
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(piece[:cut], piece[cut:]) for _, cut, piece in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(control)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=convert_tokenizer_to_chat_template(MISTRAL),
    )


class Characters(PreTrainedTokenizer):
    """Not a "fast" one: a token a character, and no places of tokens in the text."""

    def __init__(self, **options):
        self.letters: dict[str, int] = {}
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return 0x110000

    def get_vocab(self) -> dict[str, int]:
        return dict(self.added_tokens_encoder)

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token) + 256  # the added tokens come first

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index - 256)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def slow() -> PreTrainedTokenizer:
    template = (PUBLISHED / "qwen2_5.jinja").read_text(encoding="utf-8")
    _, end, special, _ = MODELS["qwen2_5"]
    return Characters(eos_token=end, pad_token="<|endoftext|>", extra_special_tokens=special, chat_template=template)


KINDS = [*((model, kind) for model in MODELS for kind in ("bytes", "merges")), ("mistral", ""), ("qwen2_5", "slow")]


@cache
def renderer_of(model: str, kind: str) -> Renderer:
    tokenizer = mistral() if model == "mistral" else slow() if kind == "slow" else byte_level(model, kind == "merges")
    return Renderer(tokenizer)


@pytest.fixture(params=KINDS, ids=lambda kind: " ".join(filter(None, kind)), scope="module")
def case(request) -> tuple[str, Renderer]:
    return request.param[0], renderer_of(*request.param)


def conversation(turns, system: str = "", muted: tuple[int, ...] = ()) -> Example:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Example(tuple(messages), (turns[-1][1],), "file:1", muted)


def harmless(example: Example) -> Example:
    return Example(tuple({**turn, "content": "a"} for turn in example.messages), ("a",), "file:1", example.muted)


def decoded(renderer: Renderer, row: Row) -> list[str]:
    """Each run of targets as text."""
    runs = groupby(zip(row.ids, row.labels, strict=True), key=lambda pair: pair[1] != IGNORE)
    assert all(token == label for token, label in zip(row.ids, row.labels, strict=True) if label != IGNORE)
    return [
        renderer.tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        for targets, run in runs
        if targets
    ]


def expected(model: str, example: Example) -> list[str]:
    """Each answer as the template renders it, with the end of its turn."""
    end = "</s>" if model == "mistral" else MODELS[model][1].rstrip("+")
    answers = [
        turn["content"]
        for place, turn in enumerate(example.messages)
        if turn["role"] == "assistant" and place not in example.muted
    ]
    if model in ("llama3_1", "gemma3"):
        answers = [answer.strip() for answer in answers]
    if model in THINKING:  # a thought stays with the turn that thought it
        answers = [answer.rpartition("</think>")[2] for answer in answers]
    if model == "qwen3":
        answers[-1] = answers[-1].lstrip("\n")
    return [answer + end for answer in answers]


def readable(model: str, example: Example) -> Example:
    """Some take the last answer apart where it closes a thought: such a row is refused, as another test says."""
    assume(model not in THINKING or "</think>" not in example.messages[-1]["content"])
    return example


def last_target(row: Row) -> int:
    return max(place for place, label in enumerate(row.labels) if label == IGNORE) + 1


def controls(renderer: Renderer, row: Row) -> list[str]:
    """The control tokens in a row, in order. Gemma's own tokens of white space are no such."""
    names = renderer.tokenizer.convert_ids_to_tokens([token for token in row.ids if token in renderer.control])
    return [name for name in names if name.strip()]


def test_targets_are_the_answers_and_their_ends(case):
    """And nothing in anybody's text, control tokens of this or another model included, opens or closes a turn."""
    model, renderer = case

    @check
    @given(exchanges, st.just("") | said)
    def holds(turns, system):
        example = readable(model, conversation(turns, system))
        row = renderer.row(example, 10**6)
        assert decoded(renderer, row) == expected(model, example)
        assert controls(renderer, row) == controls(renderer, renderer.row(harmless(example), 10**6))
        ((_, last),) = renderer.rows([example], 10**6, last_turn=True)
        assert decoded(renderer, last) == expected(model, example)[-1:]
        assert last.ids == row.ids

    holds()


def test_what_is_trained_is_what_is_asked(case):
    """The tokens before the last answer are those of the prompt, whatever merges: after others it would be untaught."""
    model, renderer = case

    @check
    @given(exchanges, st.just("") | said)
    def holds(turns, system):
        example = readable(model, conversation(turns, system))
        row = renderer.row(example, 10**6)
        assert row.ids[: last_target(row)] == renderer.ids(example.messages[:-1], prompt=True)

    holds()


def test_one_beginning_of_sequence(case):
    """Where the template writes one; the tokenizers here add another to all other text."""
    model, renderer = case
    bos = renderer.tokenizer.bos_token_id
    row = renderer.row(conversation([("Hi?", "Hello."), ("<s><bos><|begin_of_text|>", "Bye.")]), 10**6)
    wanted = int(bos is not None and model != "phi3")  # the published template of Phi-3 has none
    assert row.ids.count(bos) == wanted
    assert (row.ids[0] == bos) == bool(wanted)


def test_a_row_cut_to_fit_is_a_conversation_still(case):
    """It loses its first exchanges, then the beginning of its question: never the answer, nor the way it is asked."""
    model, renderer = case

    @check
    @given(exchanges, st.integers(0, 200))
    def holds(turns, room):
        example = readable(model, conversation(turns))
        whole = renderer.row(example, 10**6)
        answer = whole.ids[last_target(whole) :]
        least = len(renderer.user_prefix()) + len(renderer.after_user_turn()) + len(answer) + 8  # of a character
        row = renderer.row(example, min(least + room, len(whole.ids)))
        assert len(row.ids) == len(row.labels) <= min(least + room, len(whole.ids))
        assert row.cut == len(whole.ids) - len(row.ids)
        assert row.ids[last_target(row) :] == answer
        start = renderer.user_prefix()[:-1]  # its last token may be one with the text's first
        assert row.ids[: len(start)] == start
        asked = renderer.after_user_turn()[1:]  # and its first with the text's last
        assert row.ids[last_target(row) - len(asked) : last_target(row)] == asked
        kept = len(decoded(renderer, row))
        assert decoded(renderer, row) == expected(model, example)[-kept:]
        alike = renderer.row(harmless(conversation(turns[-kept:])), 10**6)
        assert controls(renderer, row) == controls(renderer, alike)

    holds()


def test_what_is_muted_is_no_target(case):
    """And what comes after the last turn that is taught has nothing to teach."""
    model, renderer = case

    @check
    @given(exchanges, st.sets(st.integers(0, 3)))
    def holds(turns, which):
        muted = tuple(2 * turn + 1 for turn in sorted(which) if turn < len(turns))
        assume(len(muted) < len(turns))
        taught = [turn for turn in range(len(turns)) if 2 * turn + 1 not in muted]
        readable(model, conversation(turns[: taught[-1] + 1]))
        example = conversation(turns, muted=muted)
        row = renderer.row(example, 10**6)
        assert decoded(renderer, row) == expected(model, example)
        assert row.ids == renderer.row(conversation(turns[: taught[-1] + 1]), 10**6).ids

    holds()


def test_an_answer_without_room_is_refused(case):
    _, renderer = case
    with pytest.raises(InputError, match=r"file:1: found an answer of [0-9,]+ tokens, expected at most \d+ of 64"):
        renderer.row(conversation([("Hi?", "Hello.\n" * 100)]), 64)


def test_a_batch_is_its_rows(case):
    model, renderer = case

    @settings(check, max_examples=5)
    @given(st.lists(exchanges, min_size=1, max_size=6))
    def holds(many):
        examples = [readable(model, conversation(turns)) for turns in many]
        assert [row for _, row in renderer.rows(examples, 10**6)] == [renderer.row(one, 10**6) for one in examples]

    holds()


def test_plain_text_is_taught_whole(case):
    """In pieces that are begun as conversations are; none is longer than a row may be."""
    _, renderer = case
    tokenizer = renderer.tokenizer

    @check
    @given(texts, st.integers(4, 40))
    def holds(text, max_length):
        rows = [row for _, row in renderer.rows([Example((), (), "file:1", text=text)], max_length)]
        begin = [tokenizer.bos_token_id] * (renderer.prompt("a")[0] == tokenizer.bos_token_id)
        assert all(row.ids[: len(begin)] == begin and len(row.ids) <= max_length for row in rows)
        ids = [
            *tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
            tokenizer.eos_token_id,
        ]
        if len(ids) % (max_length - len(begin)) == 1 and not begin:
            ids.pop()  # alone in its row there would be nothing to tell it from
        assert [label for row in rows for label in row.labels if label != IGNORE] == ids

    holds()


def test_mistral_encodes_the_same():
    """The reference is Mistral's own library, where no text is a control token: those we tokenise apart."""
    renderer = renderer_of("mistral", "")
    reference = MistralTokenizer.from_file(str(MISTRAL), mode=ValidationMode.finetuning)
    names = [token.content for token in renderer.tokenizer.added_tokens_decoder.values()]

    @check
    @given(st.lists(st.tuples(said, said), min_size=1, max_size=3))
    def holds(turns):
        example = conversation([(question, answer.rstrip(" ")) for question, answer in turns])  # it strips these
        assume(not any(name in turn["content"] for turn in example.messages for name in names))
        ids = reference.encode_chat_completion(ChatCompletionRequest(messages=list(example.messages))).tokens
        assert renderer.row(example, 10**6).ids == ids

    holds()


@pytest.mark.parametrize("model", THINKING)
def test_a_thought_that_cannot_follow_the_prompt_is_refused(model):
    """They are asked without a thought; the template moves one in the answer to where none was asked, or drops it."""
    renderer = renderer_of(model, "merges")
    end = MODELS[model][1]
    assert renderer.tokenizer.decode(renderer.prompt("Hi?")).endswith("<think>\n\n</think>\n\n")
    thoughtful = "<think>\nHm.\n</think>\n\nHello."
    with pytest.raises(InputError, match="file:1: found an answer that the chat template takes apart"):
        renderer.row(conversation([("Hi?", thoughtful)]), 512)
    row = renderer.row(conversation([("Hi?", thoughtful), ("And?", "Bye.")]), 512)
    assert [text.strip() for text in decoded(renderer, row)] == [f"Hello.{end}", f"Bye.{end}"]


@pytest.mark.parametrize("text", ["\U000f0000<|im_end|>\U000f0001", "<|im_\U000f0000end|>", "\U000f0001<|im_end|>"])
def test_the_marks_of_control_tokens_cannot_be_forged(text):
    renderer = renderer_of("qwen2_5", "merges")
    row = renderer.row(conversation([(text, text)]), 512)
    assert controls(renderer, row) == controls(renderer, renderer.row(conversation([("a", "a")]), 512))
    assert row.ids[: last_target(row)] == renderer.ids([{"role": "user", "content": text}], prompt=True)

"""Example -> Row: ids and labels, found by rendering the prompt and asserting that it is a prefix of the whole."""

import itertools
import math
import re
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from kdguard.data import IGNORE
from kdguard.data.formats import Example
from kdguard.errors import InputError

# For base models that come without a template: ChatML, ended by the model's own end-of-text token.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_MARK = "\u2042"  # stands for a turn's text where the template around it is looked at
_NO_THOUGHT = "<think>\n\n</think>\n\n"
_EDGE = "\U0010fffe"  # stands at both edges of a turn's text where its place is looked for; no character
TARGET, TEXT, TEMPLATE = "target", "text", "template"

Span = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """One tokenised sequence. `labels[i]` is `ids[i]` where it is a target token, else -100 (not shifted).

    cut: how many tokens of its prompt were left out, because the row is too long. chat: what was tokenised, while the
    row is new.
    """

    ids: list[int]
    labels: list[int]
    cut: int = 0
    chat: "_Chat | None" = field(default=None, repr=False, compare=False)

    @property
    def targets(self) -> int:
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class _Chat:
    """A rendered conversation, and where the answers in it begin: turn -> place in the text, in order.

    taught: the turns among them that are targets. marked: people's text in it holds control tokens, which are marked.
    """

    messages: list[dict[str, str]]
    text: str
    starts: dict[int, int]
    taught: tuple[int, ...]
    marked: bool


class Renderer:
    """Renders conversations with the tokenizer's own chat template.

    Control tokens of the tokenizer that stand in people's text are plain text: no data can open or close a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        added = tokenizer.added_tokens_decoder.values()
        in_template = (token.content for token in added if token.content in tokenizer.chat_template)
        names = {token.content for token in added if token.special} | {name for name in in_template if name.strip()}
        self._controls = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
        self._opens_thought = self._render([{"role": "user", "content": _MARK}], True).rstrip().endswith("<think>")
        self.end_of_turn = self._find_end_of_turn()
        self._asked = self.after_user_turn()

    def ids(self, messages: Sequence[dict[str, str]], *, prompt: bool = False) -> list[int]:
        """Token ids of a conversation; `prompt` adds the start of the assistant's turn. Rendered once, so one BOS.

        An answer in it is tokenised as it was when it was a target: apart from what stands before it.
        """
        turns, marked = self._marked(messages)
        text = self._text(turns, prompt=prompt)
        return self._encoded(_Chat(turns, text, self._starts(turns, text, prompt=prompt), (), marked))[0]

    def prompt(self, question: str) -> list[int]:
        """The ids after which the model answers `question`."""
        return self.ids([{"role": "user", "content": question}], prompt=True)

    def prompt_text(self, messages: Sequence[dict[str, str]]) -> str:
        """The text of a conversation up to the assistant's turn, for programs that tokenise it themselves."""
        return self._text(messages, prompt=True)

    def user_prefix(self) -> list[int]:
        """The ids after which the model writes a user's turn itself (Magpie, arXiv 2406.08464); one at least."""
        text = self._text([{"role": "user", "content": _MARK}])
        start = self.tokenizer.bos_token_id
        return self._tokenize(text[: text.index(_MARK)]) or [self.tokenizer.eos_token_id if start is None else start]

    def after_user_turn(self) -> list[int]:
        """The ids between the end of a user's text and the start of the assistant's."""
        text = self._text([{"role": "user", "content": _MARK}], prompt=True)
        return self._piece(text[text.index(_MARK) + len(_MARK) :])

    def row(self, example: Example, max_length: int) -> Row:
        """Label every assistant turn, its end-of-turn token included; a row too long loses prompt, never answer.

        Of what is several rows, the last. A turn that the template leaves out, or that it ends only where
        it is the last, is context. What follows the last turn that is taught is left out. Raises InputError for a row
        that the template refuses, or that has no room for its answer.
        """
        *_, (_, row) = self.rows([example], max_length)
        if isinstance(row, InputError):
            raise row
        return row

    def rows(
        self, examples: Sequence[Example], max_length: int, *, last_turn: bool = False
    ) -> Iterator[tuple[Example, Row | InputError]]:
        """The row of each example, or the error in its place.

        Plain text becomes as many rows as it takes; so does a conversation that is too long, each with its system turn
        and the exchanges that fit.

        last_turn: label the last turn that is taught alone.
        """
        chats: list[_Chat | InputError | None] = []  # None: plain text
        for example in examples:
            try:
                chats.append(self._chat(example, last_turn) if example.messages else None)
            except InputError as error:
                chats.append(error)
        whole = (
            [chat for chat in chats if isinstance(chat, _Chat) and not chat.marked] if self.tokenizer.is_fast else []
        )
        encoded = self.tokenizer([chat.text for chat in whole], add_special_tokens=False) if whole else None
        numbers = {id(chat): number for number, chat in enumerate(whole)}
        for example, chat in zip(examples, chats, strict=True):
            if chat is None:
                yield from ((example, row) for row in self._text_rows(example, max_length))
                continue
            try:
                if isinstance(chat, InputError):
                    raise chat
                number = numbers.get(id(chat))
                row = self._labelled(chat, *self._encoded(chat, encoded, number))
                if len(row.ids) > max_length:
                    yield from self._split(example, row, max_length, last_turn)
                else:
                    yield example, row
            except InputError as error:
                yield example, error
            except ValueError as error:  # a control token that this tokenizer makes of plain text too
                yield example, InputError(f"{example.where}: {error}", "leave it out of the row")

    def kinds(self, row: Row) -> list[str]:
        """What each token of a new row is: TARGET, TEXT (people's words that are not taught) or TEMPLATE.

        A token that holds both words and template is TEXT.
        """
        kinds = [TEMPLATE if label == IGNORE else TARGET for label in row.labels]
        if (chat := row.chat) is None:
            return kinds
        apart = _alike(self._encoded(chat)[0], row.ids) >= len(row.ids) - 1  # a row may have got its end afterwards

        def tokens_before(edge: int) -> tuple[int, bool]:
            """How many tokens of the row stand before this character, and whether the next one reaches over it."""
            starts = {turn: start for turn, start in chat.starts.items() if apart and start <= edge}
            ids, _ = self._encoded(replace(chat, text=chat.text[:edge], starts=starts))
            alike = _alike(ids, row.ids)
            return alike, alike < len(ids)

        for turn in range(len(chat.messages)):
            start, end = self._place(chat.messages, turn)
            if start < end:
                first, _ = tokens_before(start)
                last, over = tokens_before(end)
                for token in range(first, last + over):
                    kinds[token] = TEXT if kinds[token] == TEMPLATE else TARGET
        return kinds

    def _place(self, messages: list[dict[str, str]], turn: int) -> Span:
        """Where a turn's text stands in the rendered conversation; an empty span for one that the template leaves out.

        Templates leave out the spaces around it, and those of reasoning models an earlier thought.
        """
        text, content = self._text(messages), messages[turn]["content"]
        for words in (content, content.strip(), content.rpartition("</think>")[2].strip()):
            before, _, after = content.rpartition(words)
            within = {**messages[turn], "content": before + _EDGE + words + _EDGE + after}
            marked = self._text([*messages[:turn], within, *messages[turn + 1 :]])
            start = _alike(text, marked)
            end = start + len(words)
            if marked == text[:start] + _EDGE + text[start:end] + _EDGE + text[end:]:
                return start, end
        return 0, 0

    def _chat(self, example: Example, last_turn: bool) -> _Chat:
        try:
            return self._rendered(example, last_turn)
        except (TemplateError, ValueError, TypeError) as error:
            raise InputError(
                f"{example.where}: the chat template refuses this conversation ({error})",
                "mend the order of its turns, or leave out its system turn",
            ) from None

    def _rendered(self, example: Example, last_turn: bool) -> _Chat:
        *earlier, last = _taught(example)
        messages, marked = self._marked(example.messages[: last + 1])
        text, prompt = self._text(messages), self._text(messages[:last], prompt=True)
        if not text.startswith(prompt):
            other = self._text([*messages[:last], {**messages[last], "content": _MARK}])
            if other.startswith(prompt):
                raise InputError(
                    f"{example.where}: found an answer that the chat template takes apart, as it does with a thought",
                    "leave the thought out of the answer",
                )
            raise InputError(
                f"{example.where}: the chat template does not render the prompt as a prefix of the whole",
                "pass another --model, or set `chat_template` in its tokenizer_config.json",
            )
        starts = {**self._starts(messages, text), last: len(prompt)}
        return _Chat(
            messages,
            text,
            starts,
            (last,) if last_turn else (*(turn for turn in earlier if turn in starts), last),
            marked,
        )

    def _marked(self, messages: Sequence[dict[str, str]]) -> tuple[list[dict[str, str]], bool]:
        if any(self._controls.search(turn["content"]) for turn in messages):
            return mark_control_tokens(messages, self._controls), True
        return list(messages), False

    def _starts(self, messages: Sequence[dict[str, str]], text: str, *, prompt: bool = False) -> dict[int, int]:
        """Where the answers, but for the last turn, begin in the text: where any other answer in their place would.

        None of them where the template leaves one out.
        """
        turns = [turn for turn, message in enumerate(messages) if turn and message["role"] == "assistant"]
        if not turns or turns == [len(messages) - 1] or self._earlier is None:
            return {}
        opening, unasked = self._earlier
        mark = next(letter for letter in map(chr, range(ord(_MARK), sys.maxunicode)) if letter not in text)
        others = [{**turn, "content": mark} if place in turns else turn for place, turn in enumerate(messages)]
        before, *around = self._text(others, prompt=prompt).split(mark)
        if len(around) != len(turns) or not text.startswith(before):
            return {}
        starts = {}
        place = len(before)
        for turn, after in zip(turns, around, strict=True):
            if before.endswith(opening):
                starts[turn] = place - unasked
            content = messages[turn]["content"]
            texts = (each for each in (content, content.strip()) if text.startswith(each + after, place))
            end = text.find(after, place + len(next(texts, "")))
            if end < 0:
                return {}
            before, place = after, end + len(after)
        return starts if place == len(text) else {}

    @cached_property
    def _earlier(self) -> tuple[str, int] | None:
        """What stands between a user's text and an answer to it that is not the last turn; None: such are no targets.

        And how many characters of its end the model is not asked with, but writes: a space, in Mistral's. Templates of
        reasoning models ask with more, an empty thought.
        """
        user, assistant = ({"role": role, "content": _MARK} for role in ("user", "assistant"))
        parts = self._text([user, assistant, user, assistant]).split(_MARK)
        if len(parts) != 5 or self.end_of_turn not in self._piece(parts[2]):
            return None
        asked, opening = self._text([user], prompt=True).split(_MARK)[1], parts[1]
        common = min(asked, opening, key=len)
        return (opening, len(opening) - len(common)) if asked.startswith(common) == opening.startswith(common) else None

    def _encoded(
        self, chat: _Chat, encoded: BatchEncoding | None = None, number: int | None = None
    ) -> tuple[list[int], dict[int, int]]:
        """The ids of a conversation, and where its answers begin in them: turn -> place.

        As it was tokenised as a whole, if it was; but piece by piece where a token reaches over the beginning of an
        answer, or where the tokens before the last one are not those that it is asked with.
        """
        if number is not None:
            ids = encoded["input_ids"][number]
            firsts = {turn: _token_at(encoded, number, start) for turn, start in chat.starts.items()}
            last = next(reversed(firsts.values()))
            if None not in firsts.values() and ids[max(0, last - len(self._asked)) : last] == self._asked:
                return ids, firsts
        ids = []
        firsts = {}
        edges = [0, *chat.starts.values(), len(chat.text)]
        for turn, (start, end) in zip([None, *chat.starts], itertools.pairwise(edges), strict=True):
            firsts[turn] = len(ids)
            ids += self._piece(chat.text[start:end], chat.marked, first=turn is None)
        return ids, firsts

    def _labelled(self, chat: _Chat, ids: list[int], firsts: dict[int, int]) -> Row:
        """Up to the end of the last answer. People's text is free of control tokens, so the next end is its own.

        A template without an end of turn gets one: nothing else would teach the model to stop.
        """
        ids.append(self.end_of_turn)
        labels = [IGNORE] * len(ids)
        for turn in chat.taught:
            end = ids.index(self.end_of_turn, firsts[turn]) + 1
            labels[firsts[turn] : end] = ids[firsts[turn] : end]
        del ids[end:], labels[end:]
        return Row(ids, labels, chat=chat)

    def _piece(self, text: str, marked: bool = False, *, first: bool = False) -> list[int]:
        """Tokenise a piece of a chat. After a line break: SentencePiece would begin the piece with a space."""

        def tokenize(text: str) -> list[int]:
            return encode_marked_chat(self.tokenizer, text) if marked else self._tokenize(text)

        line_break = tokenize("\n")
        if not first and (ids := tokenize("\n" + text))[: len(line_break)] == line_break:
            return ids[len(line_break) :]
        return tokenize(text)

    def _text_rows(self, example: Example, max_length: int) -> Iterator[Row]:
        """A plain text as it is, all of it targets: in pieces of `max_length`, each begun like a conversation."""
        ids = self.tokenizer(example.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [*ids, self.tokenizer.eos_token_id]
        begin = [token for token in self.prompt(_MARK)[:1] if token == self.tokenizer.bos_token_id]
        size = max_length - len(begin)
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            if len(begin) + len(piece) > 1:  # a token alone is predicted by nothing
                yield Row(begin + piece, [IGNORE] * len(begin) + piece)

    def _split(
        self, example: Example, row: Row, max_length: int, last_turn: bool
    ) -> Iterator[tuple[Example, Row | InputError]]:
        """A conversation that is too long, as several: the last has as many exchanges as fit, and so on backwards."""
        total = len(row.ids)
        turns = example.messages[: _taught(example)[-1] + 1]
        begin = next(place for place, turn in enumerate(turns) if turn["role"] != "system")
        later = [place for place, turn in enumerate(turns) if turn["role"] == "user" and place > begin]

        def part(first: int, last: int) -> Example:
            """With the exchanges of these turns alone."""
            messages = turns[:begin] + turns[first:last]
            muted = tuple(place - first + begin for place in example.muted if first <= place < last)
            answer = messages[-1]["content"]
            answers = example.answers if answer == example.messages[-1]["content"] else (answer,)
            return replace(example, messages=messages, muted=muted, answers=answers)

        def fits(first: int) -> bool:
            _, found = next(self.rows([part(first, len(turns))], sys.maxsize, last_turn=last_turn))
            return isinstance(found, Row) and len(found.ids) <= max_length

        cut = min(bisect_left(later, True, key=fits), len(later) - 1) if later else -1
        if later and not last_turn:
            earlier = part(begin, later[cut])
            if _answers(earlier):
                yield from self.rows([earlier], max_length)
        last = part(later[cut] if later else begin, len(turns))
        try:
            yield last, replace(found := self._shortened(last, max_length, last_turn), cut=total - len(found.ids))
        except InputError as error:
            yield last, error

    def _shortened(self, example: Example, max_length: int, last_turn: bool) -> Row:
        """The row of one exchange without the beginning of its prompt, as much as it takes."""
        total = 0
        while True:
            _, row = next(self.rows([example], sys.maxsize, last_turn=last_turn))
            if isinstance(row, InputError):
                raise row
            total = total or len(row.ids)
            excess = len(row.ids) - max_length
            if excess <= 0:
                return row
            shorter = self._shorter(example, excess)
            if shorter is None:
                answer = len(row.ids) - max(i for i, label in enumerate(row.labels) if label == IGNORE) - 1
                room = max(0, max_length - len(row.ids) + answer)
                raise InputError(
                    f"{example.where}: found an answer of {answer:,} tokens, "
                    f"expected at most {room:,} of {max_length:,}",
                    f"--max-length {total}, or shorten the row",
                )
            example = shorter

    def _shorter(self, example: Example, excess: int) -> Example | None:
        turns = example.messages
        for role in ("user", "system"):
            for place, turn in enumerate(turns):
                text = turn["content"]
                if turn["role"] == role and len(text) > 1:
                    each = len(text) / max(1, len(self._tokenize(text)))
                    rest = text[min(math.ceil(excess * each), len(text) - 1) :]
                    return replace(example, messages=(*turns[:place], {**turn, "content": rest}, *turns[place + 1 :]))
        return None

    def _find_end_of_turn(self) -> int:
        text = self._text([{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}])
        rest = self._piece(text[text.rindex(_MARK) + len(_MARK) :])
        return next((token for token in rest if token in self.control), self.tokenizer.eos_token_id)

    def _text(self, messages: Sequence[dict[str, str]], *, prompt: bool = False) -> str:
        """A thought that the template opens whatever it is told is closed at once: so an answer follows, as asked."""
        text = self._render(messages, prompt)
        if not self._opens_thought:
            return text
        if prompt:
            return text[: text.rindex("<think>")] + _NO_THOUGHT
        *asked, last = messages
        if last["role"] == "assistant" and "</think>" not in last["content"]:
            before = self._text(asked, prompt=True)
            opening = before.removesuffix(_NO_THOUGHT)
            if text.startswith(opening) and not text.startswith(before):
                return before + text[len(opening) :]
        return text

    def _render(self, messages: Sequence[dict[str, str]], prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, enable_thinking=False
        )

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _answers(example: Example) -> list[int]:
    """The turns that are taught, by their place."""
    return [
        i for i, turn in enumerate(example.messages) if i and turn["role"] == "assistant" and i not in example.muted
    ]


def _taught(example: Example) -> list[int]:
    """The same. Raises InputError where there are none."""
    if turns := _answers(example):
        return turns
    raise InputError(
        f"{example.where}: found no turn of the assistant that can be trained",
        "put a user's turn before it, or delete the row",
    )


def _alike(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items two sequences begin with alike."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


def _token_at(encoded: BatchEncoding, number: int, edge: int) -> int | None:
    """The token that begins at this character of a text, if one does."""
    token = encoded.char_to_token(number, edge)
    return token if token is not None and encoded.token_to_chars(number, token).start == edge else None


def with_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer without a chat template ChatML, and one without a padding token its end token.

    Padding is told by the attention mask, never by the token's id.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = "{{ bos_token }}" * adds_bos + CHATML
    return tokenizer

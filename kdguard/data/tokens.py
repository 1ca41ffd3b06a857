"""Example -> Row: ids and labels, found by rendering the prompt and asserting that it is a prefix of the whole."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

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


@dataclass(frozen=True)
class Row:
    """One tokenised sequence. `labels[i]` is `ids[i]` where it is a target token, else -100 (not shifted)."""

    ids: list[int]
    labels: list[int]

    @property
    def targets(self) -> int:
        return sum(label != IGNORE for label in self.labels)


class Renderer:
    """Renders conversations with the tokenizer's own chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        self.end_of_turn = self._find_end_of_turn()

    def ids(self, messages: Sequence[dict[str, str]], *, prompt: bool = False) -> list[int]:
        """Token ids of a conversation; `prompt` adds the start of the assistant's turn. Rendered once, so one BOS."""
        return self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=prompt, return_dict=False, enable_thinking=False
        )

    def prompt(self, question: str) -> list[int]:
        """The ids after which the model answers `question`."""
        return self.ids([{"role": "user", "content": question}], prompt=True)

    def user_prefix(self) -> list[int]:
        """The ids after which the model writes a user's turn itself (Magpie, arXiv 2406.08464); one at least."""
        text = self._text([{"role": "user", "content": _MARK}])
        start = self.tokenizer.bos_token_id
        return self._tokenize(text[: text.index(_MARK)]) or [self.tokenizer.eos_token_id if start is None else start]

    def after_user_turn(self) -> list[int]:
        """The ids between the end of a user's text and the start of the assistant's."""
        text = self._text([{"role": "user", "content": _MARK}], prompt=True)
        return self._tokenize(text[text.index(_MARK) + len(_MARK) :])

    def row(self, example: Example, max_length: int) -> Row:
        """Label every assistant turn, its end-of-turn token included; a row too long loses prompt, never answer.

        A template that renders an earlier turn differently once the conversation goes on (as those of reasoning
        models do) leaves that turn as context. Raises InputError for a row that the template refuses, or that has no
        room for its answer.
        """
        try:
            return self._cut(self._labelled(example), example.where, max_length)
        except (TemplateError, ValueError, TypeError) as error:
            raise InputError(
                f"{example.where}: the chat template refuses this conversation ({error})",
                "mend the order of its turns, or leave out its system turn",
            ) from None

    def _labelled(self, example: Example) -> Row:
        ids = self.ids(example.messages)
        labels = [IGNORE] * len(ids)
        for turn, message in enumerate(example.messages):
            if message["role"] != "assistant" or turn == 0:
                continue
            prefix = self.ids(example.messages[:turn], prompt=True)
            if ids[: len(prefix)] != prefix:
                if turn == len(example.messages) - 1:
                    raise InputError(
                        f"{example.where}: the chat template does not render the prompt as a prefix of the whole",
                        "pass another --model, or set `chat_template` in its tokenizer_config.json",
                    )
                continue
            end = ids.index(self.end_of_turn, len(prefix)) + 1 if self.end_of_turn in ids[len(prefix) :] else len(ids)
            labels[len(prefix) : end] = ids[len(prefix) : end]
        while labels[-1] == IGNORE:  # what the template adds after the end of the last turn
            ids.pop(), labels.pop()
        return Row(ids, labels)

    def _cut(self, row: Row, where: str, max_length: int) -> Row:
        excess = len(row.ids) - max_length
        if excess <= 0:
            return row
        answer = next(i for i in range(len(row.ids) - 1, -1, -1) if row.labels[i] == IGNORE) + 1
        start = 1 if row.ids[0] == self.tokenizer.bos_token_id else 0
        if answer - excess < start + 1:
            raise InputError(
                f"{where}: found an answer of {len(row.ids) - answer} tokens, expected fewer than {max_length}",
                f"--max-length {len(row.ids)}, or shorten the row",
            )
        kept = [*range(start), *range(start + excess, len(row.ids))]
        return Row([row.ids[i] for i in kept], [row.labels[i] for i in kept])

    def _find_end_of_turn(self) -> int:
        text = self._text([{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}])
        rest = self._tokenize(text[text.rindex(_MARK) + len(_MARK) :])
        return next((token for token in rest if token in self.control), self.tokenizer.eos_token_id)

    def _text(self, messages: Sequence[dict[str, str]], *, prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, enable_thinking=False
        )

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class Collator:
    """Rows -> a right-padded batch: `input_ids`, `attention_mask` and `labels`, each (rows, tokens)."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        width = max(len(row.ids) for row in rows)

        def stack(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([value + [fill] * (width - len(value)) for value in values])

        return {
            "input_ids": stack([row.ids for row in rows], self.pad),
            "attention_mask": stack([[1] * len(row.ids) for row in rows], 0),
            "labels": stack([row.labels for row in rows], IGNORE),
        }


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

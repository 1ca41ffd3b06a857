"""Trouble within a text: its encoding, control tokens, and what looks like a secret. No torch.

Most texts have none, so a pattern is only tried where some fixed letters of it occur.
"""

import re
from collections.abc import Iterator

from ftfy import fix_encoding
from ftfy.badness import is_bad
from ftfy.fixes import fix_c1_controls, remove_terminal_escapes

ENCODING, CONTROL, SECRET = "encoding", "control tokens", "secrets"

# Not tabs and line breaks; with what overrides the direction of writing, and the marks of byte order and of what could
# not be decoded.
_STEERING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202d\u202e\ufeff\ufffd]")
_BREAKS = re.compile("[\x0b\x0c\x1c-\x1e]")  # old ways to begin a line or a page
_TWICE_ENCODED = ("Ã", "Â", "â€", "ðŸ", "Ð", "ï¿½")  # what UTF-8 looks like when read as Windows-1252
_TOKENS = re.compile(r"<\|[A-Za-z_]{2,24}\|>|\[/?INST\]|<(?:start|end)_of_turn>")
# One letter that is quick to look for, the letters of which it is one, what they begin, and how that goes on.
_SECRETS = [
    ("-", "-----BEGIN ", "a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
    ("K", "AKIA", "a key of AWS", re.compile(r"\bAKIA[0-9A-Z]{16}\b")),
    ("z", "AIza", "a key of Google", re.compile(r"\bAIza[\w-]{35}")),
    ("_", "gh", "a token of GitHub", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,})")),
    ("_", "hf_", "a token of Hugging Face", re.compile(r"\bhf_[A-Za-z0-9]{30,}")),
    ("-", "sk-", "a key of OpenAI or Anthropic", re.compile(r"\bsk-[\w-]{20,}")),
    ("-", "xox", "a token of Slack", re.compile(r"\bxox[abeoprs]-[\w-]{10,}")),
    ("J", "eyJ", "a JSON web token", re.compile(r"(?<![\w-])eyJ[\w-]{10,2000}\.eyJ[\w-]{10,2000}\.[\w-]{10,}")),
    ("@", "@", "an e-mail address", re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,63})+")),
]


def troubles(text: str) -> Iterator[tuple[str, str]]:
    """The kinds of trouble that a text has, each with what was found."""
    if _may_steer(text) and (found := _STEERING.search(text)):
        yield (
            ENCODING,
            f"the control character {ord(found[0]):#06x}" if found[0] != "\ufffd" else "a lost character (�)",
        )
    if not text.isascii() and _is_twice_encoded(text):
        start = min(at for sign in _TWICE_ENCODED if (at := text.find(sign)) >= 0)
        yield ENCODING, f"text that was decoded wrongly: {' '.join(text[max(0, start - 10) : start + 20].split())}"
    if ("<" in text or "[" in text) and (found := _TOKENS.search(text)):
        yield CONTROL, f"{found[0]}, which the model will read as plain text"
    for letter, begin, name, secret in _SECRETS:
        if letter in text and begin in text and (found := secret.search(text)):
            yield SECRET, f"what looks like {name}: {found[0][:6]}..."


def mended(text: str) -> str:
    """The text decoded rightly where that can be told, and without what steers a terminal. What was lost stays lost."""
    if not text.isascii() and _is_twice_encoded(text):
        text = fix_encoding(text)
    if not _may_steer(text):
        return text
    text = _BREAKS.sub("\n", remove_terminal_escapes(fix_c1_controls(text)))
    return _STEERING.sub(lambda found: "\ufffd" if found[0] == "\ufffd" else "", text)


def _may_steer(text: str) -> bool:
    return not text.isprintable() or "\ufffd" in text


def _is_twice_encoded(text: str) -> bool:
    return any(sign in text for sign in _TWICE_ENCODED) and bool(is_bad(text))

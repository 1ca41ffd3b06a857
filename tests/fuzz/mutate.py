"""Good bytes -> bad ones: what breaking downloads, slipping editors and people of ill will make of a file."""

import copy
import json
import random
from typing import Any

SCRAPS = [
    *(
        b"\0",
        b"\0" * 64,
        b"\xff",
        b"\xfe\xff",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\xc3",
        b"\xf4\x90\x80\x80",
    ),
    *(
        b"\\ud800",
        b"\\u0000",
        b"\x1b[31m",
        b"\xe2\x80\xa8",
        b"\xc2\x85",
        b"\r",
        b"\r\n",
        b"\n",
        b"\t",
        b'"',
        b"'",
        b"\\",
    ),
    *(b",", b":", b"{", b"}", b"[", b"]", b"|", b";", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0", b"-1"),
    *(b"9" * 5000, b"1" + b"0" * 400, b"18446744073709551616", b"0.1e-400", b"../", b"/etc/passwd"),
    *(b"&a ", b"*a", b"!!python/name:os.system ", b"<<: ", b"!!binary x", b"- ", b"---\n", b"%YAML 9\n"),
    *(b"{{", b"[bold]", b"(a+)+$", b".*" * 20),
]
DEEP = [b"[", b'{"a":', b"- ", b"(", b'[{"role":']
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf")),
    *("", " ", "\0", "\ud800", "a\nb", "[x", "{}", "x" * 3000, "..", "../x", "/etc/passwd", "1%", "9" * 30, "=1+1"),
    *("LORA", "(a+)+$", "user", "assistant", "[link=x]", "<script>"),
    *([], [[]], {}, {"": {}}, [None], ["a", "a"], {"a": [1]}, [0] * 200),
]


def mutated(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """A few changes, one after another."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        content = rng.choice(_CHANGES)(rng, content, others)
    return content[: 2**21]


def mutated_json(rng: random.Random, value: Any) -> Any:
    """The same value with some other values, keys or lengths within it."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 4))):
        holder, key = _place(rng, value)
        if holder is None:
            return rng.choice(VALUES)
        change = rng.randrange(5)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, dict):
            holder[rng.choice([*map(str, holder), "", "\ud800", "x" * 300, "a\nb"])] = holder.pop(key)
        elif change == 2 and isinstance(holder, list):
            holder.extend(copy.deepcopy(holder[:100]))
        elif change == 3 and isinstance(holder[key], (int, float)) and abs(holder[key]) < 2**64:
            holder[key] = rng.choice((-holder[key], holder[key] * 10**9, holder[key] + 0.5, str(holder[key])))
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def dumped(rng: random.Random, value: Any) -> bytes:
    """JSON as some tool may write it."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 2)))
    return text.encode(errors="surrogatepass")


def _place(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """Where something stands in a value: what holds it, and its key or place."""
    holder, key = None, None
    while isinstance(value, (dict, list)) and value and (holder is None or rng.random() < 0.75):
        holder = value
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = value[key]
    return holder, key


def _span(rng: random.Random, content: bytes) -> tuple[int, int]:
    start = rng.randint(0, len(content))
    return start, min(len(content), start + rng.choice((0, 1, 1, 4, 30, 400)))


def _flip(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20)) if content else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    return content[: rng.randint(0, len(content))]


def _drop(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    start, end = _span(rng, content)
    return content[:start] + content[end:]


def _insert(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    start, end = _span(rng, content)
    return content[:start] + rng.choice(SCRAPS) + content[rng.choice((start, end)) :]


def _repeat(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    start, end = _span(rng, content)
    return content[:end] + content[start:end] * rng.choice((1, 2, 50)) + content[end:]


def _splice(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    return content[: rng.randint(0, len(content))] + other[rng.randint(0, len(other)) :]


def _deepen(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    start, _ = _span(rng, content)
    return content[:start] + rng.choice(DEEP) * rng.choice((10, 500, 990, 1000, 5000, 20_000)) + content[start:]


def _recode(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    text = content.decode("utf-8", errors="replace")
    return text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "cp1252", "utf-8-sig", "utf-7")), errors="replace")


def _number(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    digits = [place for place, sign in enumerate(content[:5000]) if 48 <= sign <= 57]
    if not digits:
        return _insert(rng, content, others)
    at = rng.choice(digits)
    return (
        content[:at] + rng.choice((b"-1", b"1e999", b"9" * 4400, b"9" * 20, b"0x1", b"1_0", b".5.")) + content[at + 1 :]
    )


_CHANGES = (_flip, _flip, _cut, _drop, _insert, _insert, _repeat, _splice, _deepen, _recode, _number)

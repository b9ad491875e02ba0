"""Mutations of JSON for the fuzzers. Every mutation depends only on the random generator that is passed in."""

import base64
import hashlib
import hmac
import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

from tests.support import JUNCTION_SECRET, ROOT, TERRA_SECRET

FIXED_SEED = 7
SEED_VARIABLE = "HEADRACE_FUZZ_SEED"
# JSON text that json.dumps cannot produce. `raw` marks it, and `encode` replaces the mark.
RAW = ("1e999", "-1e999", "1E400", "NaN", "-Infinity", "1" * 400, "0.1e-400", "-0", '"\\ud800"', '"\\u0000"')
RAW += ('"\\uDC00x"',)
RAW += ("[" * 2000 + "]" * 2000, '{"a":' * 600 + "1" + "}" * 600, '"\ufeff"', "[]" * 2, '{"a":1,"a":2}', "01", "tru")
NUMBERS = (0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 1e300, -1e300, 5e-324, 0.1, -0.0, True, False)
TEXTS = ("", " ", "null", "NaN", "0", "-1", "1e5", "é" * 300, "\u0000", "a\u0000b", "\ufffd", "😀" * 50)
TEXTS += ("..", "../../x", "%2e")
TEXTS += ("2026-03-14", "2026-02-30", "9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+14:00", "2026-03-14T06:30:00")
TEXTS += ("+275760-09-13T00:00:00Z", "1773469800", "infinity", "epoch", "'; DROP TABLE x; --", "\u202e", "\r\nx: y")
DATES = re.compile(r"\d{4}-\d\d-\d\d")
ESCAPED = str.maketrans({letter: f"\\u{ord(letter):04x}" for letter in "aeiou_"})
Path = tuple[Any, ...]


def raw(text: str) -> str:
    """A string that `encode` replaces by this JSON text."""
    return f"@@{text.encode().hex()}@@"


def encode(dice: random.Random, value: Any) -> bytes:
    """The JSON text of a value; in one case of eight with an object that repeats a name."""
    text = json.dumps(value, ensure_ascii=dice.random() < 0.5)
    text = re.sub(r'"@@([0-9a-f]*)@@"', lambda found: bytes.fromhex(found[1]).decode(), text)
    names = list(re.finditer(r'"([a-z_]+)": ', text)) if dice.random() < 0.125 else []
    if names:
        found = dice.choice(names)
        name = found[1].translate(ESCAPED) if dice.random() < 0.5 else found[1]
        doubled = f'"{name}": {json.dumps(odd(dice)) if dice.random() < 0.5 else dice.choice(RAW)}, '
        text = text[: found.start()] + doubled + text[found.start() :]
    return text.encode(errors="surrogatepass")


def odd(dice: random.Random) -> Any:
    """A value that a field does not expect: of another type, very large, very long or malformed."""
    kind = dice.randrange(8)
    if kind == 0:
        return dice.choice([None, [], {}, [None], [[]], {"": {}}, [{}] * 50])
    if kind == 1:
        return raw(dice.choice(RAW))
    if kind < 4:
        return dice.choice(NUMBERS)
    if kind == 4:  # random text does not compress, so 3,000 characters of it are too long for an index of PostgreSQL
        return dice.randbytes(dice.choice([20, 150, 1500, 5000])).hex()
    return dice.choice(TEXTS)


def paths(value: Any, prefix: Path = ()) -> Iterator[Path]:
    """The paths of all nodes below the root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield (*prefix, key)
        yield from paths(one, (*prefix, key))


class Mutator:
    """Changes events. `events` are the unchanged ones, `people` the user ids that a mutation may insert."""

    def __init__(self, dice: random.Random, events: Sequence[Any], people: Sequence[str]) -> None:
        self._dice, self._people = dice, people
        self._texts = [json.dumps(one) for one in events]
        self._paths = [list(paths(one)) for one in events]

    def body(self) -> bytes:
        """The body of a mutated event. One of thirty has changed bytes instead of changed values."""
        dice = self._dice
        number = dice.randrange(len(self._texts))
        if dice.random() < 1 / 30:
            return self._changed_bytes(self._texts[number].encode())
        value = json.loads(self._texts[number])
        for _ in range(dice.choice((1, 1, 1, 2, 3, 8))):
            self._mutate(value, dice.choice(self._paths[number]))
        return encode(dice, value)

    def _changed_bytes(self, body: bytes) -> bytes:
        at, kind = self._dice.randrange(len(body)), self._dice.randrange(4)
        if kind == 0:
            return body[:at]
        if kind == 1:
            return body[:at] + self._dice.randbytes(3) + body[at:]
        if kind == 2:
            return body[:at] + body[at + 1 :]
        return self._dice.choice(
            [b"", b"{}", b"null", b"[" * 5000, b"\xef\xbb\xbf" + body, body.decode().encode("utf-16")]
        )

    def _mutate(self, root: Any, path: Path) -> None:
        """Changes one node. Does nothing if an earlier change has removed it."""
        parent = root
        try:
            for key in path[:-1]:
                parent = parent[key]
            value = parent[path[-1]]
        except (LookupError, TypeError):
            return
        if isinstance(parent, dict | list):
            self._change(parent, path[-1], value)

    def _change(self, parent: Any, key: Any, value: Any) -> None:
        dice, kind = self._dice, self._dice.randrange(11)
        if kind == 0:
            del parent[key]
        elif kind == 1:
            parent[key] = self._piece()
        elif kind == 2:
            parent[key] = dice.choice([[value], {"data": value}, str(value), [value] * 3])
        elif kind == 3 and isinstance(value, list) and value:
            parent[key] = value * dice.choice([2, 20]) if dice.random() < 0.5 else value[::-1]
        elif kind == 4 and isinstance(parent, dict):
            parent[dice.choice([str(key) + "_x", str(key).upper(), "id", "user_id", "data", "source", "type"])] = value
        elif kind == 5 and isinstance(parent, dict):
            parent["user_id"] = dice.choice(self._people)
        elif kind == 6 and isinstance(value, str) and DATES.match(value):
            parent[key] = self._other_date(value)
        elif kind == 7 and isinstance(value, int | float):
            parent[key] = dice.choice([-value, value * 1e6, value + 0.5, str(value), value * 0])
        elif kind == 8 and isinstance(value, str):
            parent[key] = dice.choice(
                [value.upper(), value + "\u0000", value * 100, value[:-1], dice.choice(self._people)]
            )
        else:
            parent[key] = odd(dice)

    def _piece(self) -> Any:
        """A node of another event."""
        number = self._dice.randrange(len(self._texts))
        value = json.loads(self._texts[number])
        for key in self._dice.choice(self._paths[number]):
            value = value[key]
        return value

    def _other_date(self, value: str) -> str:
        year = self._dice.choice(["0000", "0001", "1969", "2026", "2300", "9999"])
        return year + value[4:] if self._dice.random() < 0.5 else value.replace("+00:00", "+25:99")


def junction_events() -> list[Any]:
    """The recorded events of Junction."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in _recorded("junction/*.json")]


def terra_events() -> list[Any]:
    """The recorded and generated events of Terra."""
    files = [file for part in ("events", "variants", "generated") for file in _recorded(f"terra/{part}/*.json")]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _recorded(pattern: str) -> list[Any]:
    return sorted((ROOT / "tests" / "recorded").glob(pattern))


def junction_headers(body: bytes, name: str, seconds: int, secret: str = JUNCTION_SECRET) -> dict[str, str]:
    """Svix headers that sign any bytes; the `svix` libraries sign only text."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{name}.{seconds}.".encode() + body, hashlib.sha256).digest()
    signature = "v1," + base64.b64encode(digest).decode()
    return {"svix-id": name, "svix-timestamp": str(seconds), "svix-signature": signature}


def terra_headers(body: bytes, name: str, seconds: int, secret: str = TERRA_SECRET) -> dict[str, str]:
    """Terra's headers that sign any bytes."""
    digest = hmac.new(secret.encode(), f"{seconds}.".encode() + body, hashlib.sha256).hexdigest()
    return {"x-terra-signature": f"t={seconds},v1={digest}", "x-terra-trace-id": name}


REPEATED = b'{"a":1,"a":2}'
ODD = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"-1e999",
    b"1" + b"0" * 5000,
    b'"\\ud800"',
    b'"a\\u0000"',
    b"[[[[]]]]",
)


def json_texts(*more: bytes) -> st.SearchStrategy[bytes]:
    """Texts of JSON values, among them some that a strict reader refuses, and `more`."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    values = st.recursive(
        scalars | st.text(max_size=12),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    )
    return values.map(lambda value: json.dumps(value).encode()) | st.sampled_from([*ODD, REPEATED, *more])

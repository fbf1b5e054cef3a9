"""Damaged and hostile inputs, drawn from a seed, and what becomes of them.

FUZZ_INPUTS sets how many each test draws; by default so few that the suite stays quick.
"""

from __future__ import annotations

import copy
import json
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from hf_locstitch.errors import LocstitchError

SEED = 14
TOKENS = (
    b"-0", b"-1", b"0", b"1", b"3.0", b"1e2", b"1e999", b"NaN", b"Infinity", b"true", b"null", b'"4"', b"[]", b"{}",
    b"[1]", b"18446744073709551615", b"18446744073709551616", b"9223372036854775808", b"4294967296", b'"\\ud800"',
    b'"F32"', b'"F4"', b'"F99"', b'"BOOL"', b'"f32"', b'"C64"', b"\xff", b"\x00", b",", b":", b"}", b"{", b'"', b" ",
    b'"__metadata__":{"a":1},', b'"__metadata__":null,', b'"__metadata__":[],', b'"x":', b'"shape":[0],', b'"shape":7,',
    b"\n", b"\xef\xbb\xbf", b"\\u0000", b"\\udfff", b"[" * 200 + b"]" * 200, b"[" * 3000,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, float("inf"), float("nan"), "", "x", "\x1b[2J",
    "../../x", "$x$", "\ud800", [], {}, [1], [[]], {"x": 1}, ["x"], [None], "9" * 5000,
)  # fmt: skip


def rounds(default: int) -> int:
    """How many inputs to draw."""
    return int(os.environ.get("FUZZ_INPUTS", default))


def damaged(rng: Random, content: bytes) -> bytes:
    """The bytes with one to three small changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(content) + 1)
        until = min(len(content), at + rng.choice((0, 1, 1, 2, 8, 40)))
        token = rng.choice(TOKENS)
        content = rng.choice(
            (
                content[:at] + token + content[until:],
                content[:at] + token + content[at:],
                content[:at] + content[until:],
                content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
                content[:until] + content[at:],
                _number_replaced(rng, content, token),
            )
        )
    return content


def _number_replaced(rng: Random, content: bytes, token: bytes) -> bytes:
    digits = [i for i, byte in enumerate(content) if 48 <= byte < 58]
    if not digits:
        return content
    at = rng.choice(digits)
    return content[:at] + token + content[at + 1 :]


def changed(rng: Random, value: Any) -> Any:
    """JSON-like data with one to three parts replaced, left out, renamed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        holder, key = rng.choice(places)
        act = rng.randrange(6)
        if act == 0:
            del holder[key]
        elif act == 1 and isinstance(holder, dict):
            holder[str(rng.choice(VALUES))] = holder.pop(key)
        elif act == 2:
            other, at = rng.choice(places)
            holder[key] = copy.deepcopy(other[at])
        elif act == 3 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif act == 4 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] = holder[key] + rng.choice((-1, 1, 7, -(2**40)))
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every part."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield value, key
        yield from _places(part)


def safetensors_bytes(header: Any, data: bytes) -> bytes:
    """A file of this JSON and these bytes, whether or not they fit together."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


class Outcomes(Counter[str]):
    """How many inputs were accepted, refused, or ended in an exception that is not one of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, tuple[str, Any]] = {}

    def note(self, call: Callable[[], object], shown: Any) -> bool:
        """Whether `call` returned. shown: the input, for the report."""
        try:
            call()
        except LocstitchError:
            self["refused"] += 1
            return False
        except Exception as error:
            self["foreign"] += 1
            self.examples.setdefault(f"{type(error).__name__}: {str(error)[:60]}", (_where(error), shown))
            return False
        self["accepted"] += 1
        return True

    def check(self, name: str) -> None:
        """Fail if there was an exception of another kind."""
        if "FUZZ_INPUTS" in os.environ:
            print(f"{name}: {dict(self)}")
        listed = [f"{kind} at {where} of {str(shown)[:300]!r}" for kind, (where, shown) in self.examples.items()]
        assert not self["foreign"], f"{self['foreign']} of {self.total()}:\n" + "\n".join(listed[:30])


def _where(error: BaseException) -> str:
    frame, at = error.__traceback__, ""
    while frame is not None:
        path = frame.tb_frame.f_code.co_filename
        if "hf_locstitch" in path:
            at = f"{path.rsplit('hf_locstitch/', 1)[-1]}:{frame.tb_lineno}"
        frame = frame.tb_next
    return at


def draws(number: int) -> Iterator[Random]:
    """A generator of random numbers for each input, so that any of them can be drawn again alone."""
    return (Random(SEED * 10**9 + i) for i in range(number))


def pick(rng: Random, options: Sequence[Any]) -> Any:
    return options[rng.randrange(len(options))]

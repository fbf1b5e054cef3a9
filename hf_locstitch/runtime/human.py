"""Human-readable numbers and lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path


def human(nbytes: float) -> str:
    """1_234_567 -> '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def counted(count: int, noun: str) -> str:
    """'1 tensor' or '3,000 tensors'."""
    return f"{count} {noun}" if count == 1 else f"{count:,} {noun}s"


def in_each(processes: int) -> str:
    """' in each of 2 processes', of what each needs for itself; nothing for one."""
    return f" in each of {processes} processes" if processes > 1 else ""


def more(count: int) -> str:
    """' (and 2 more)' for three in all."""
    return f" (and {count - 1} more)" if count > 1 else ""


def some(names: Sequence[str]) -> str:
    """The first three, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def number_meant(text: str) -> float | None:
    """0.1 of '10%', '10 %' and '0,1'; None of what is no number that way either."""
    try:
        number = float(text.removesuffix("%").replace(",", "."))
    except ValueError:
        return None
    return number / 100 if text.endswith("%") else number


def nearest(given: str, known: Iterable[str], within: Path | None = None) -> str:
    """'. Did you mean X?', or nothing if nothing known is like what was given. within: the folder of what is known."""
    close = get_close_matches(given, list(known), n=1)
    return f". Did you mean {within / close[0] if within else close[0]}?" if close else ""

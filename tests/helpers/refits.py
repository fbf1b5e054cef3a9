"""Small refits: their settings, and what is looked at afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.models import load
from hf_locstitch import Magnitude

HOW = Magnitude(density=0.3)
SMALL: dict[str, Any] = {"inputs": 24, "held_out": 0.25, "batch": 5, "start": "mean"}


def read_record(out: Path) -> dict[str, Any]:
    return json.loads((out / "locstitch.json").read_text())


def distance(one: Path, other: Path) -> float:
    """The largest difference of any weight."""
    states = load(one), load(other)
    return max((states[0][name] - states[1][name]).abs().max().item() for name in states[0])

"""Searching models on the Hub, as the visitor may see them."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_locstitch.ui.visitor import Visitor

FOUND = 12
SHORTEST = 2  # characters of a search
PAUSE = 0.25  # seconds without a key, after which typing counts as done
MOST = 1_000  # fields that are typed in at a time


@dataclass(frozen=True)
class Found:
    """A model of a search's answer. downloads: of the last month."""

    repo: str
    downloads: int = 0
    note: str = ""

    @property
    def label(self) -> str:
        """For a list to choose from."""
        told = [f"{_short(self.downloads)} downloads"] if self.downloads else []
        return " · ".join([self.repo, *told, *([self.note] if self.note else [])])


class Typing:
    """Tells, of the searches that somebody's typing brings about, which is the last: the others need no answer."""

    def __init__(self, pause: float = PAUSE) -> None:
        self._pause, self._newest = pause, OrderedDict[str, object]()
        self._lock = threading.Lock()

    def settled(self, who: str) -> bool:
        """Wait for a moment; whether nothing more was typed in it. who: a page and a field."""
        turn = object()
        with self._lock:
            self._newest.pop(who, None)
            self._newest[who] = turn
            while len(self._newest) > MOST:
                self._newest.popitem(last=False)
        time.sleep(self._pause)
        with self._lock:
            return self._newest.get(who) is turn


def search_models(text: str, visitor: Visitor, finetuned_from: str | None = None) -> list[Found]:
    """Models by name, the most downloaded first; with `finetuned_from`, those whose card names that base.

    Returns nothing where the Hub does not answer: a name can still be pasted.
    """
    from huggingface_hub import HfApi

    text = text.strip()[:100]
    if len(text) < SHORTEST and finetuned_from is None:
        return []
    how: dict[str, Any] = {"search": text or None, "sort": "downloads", "limit": FOUND, "token": visitor.client_token}
    if finetuned_from is not None:
        how["filter"] = f"base_model:finetune:{finetuned_from.partition('@')[0]}"
    try:
        return _told(HfApi().list_models(**how))
    except Exception:
        return []


def _told(models: Iterable[Any]) -> list[Found]:
    return [Found(one.id, int(one.downloads or 0), "private" if one.private else "") for one in models]


def _short(count: int) -> str:
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)

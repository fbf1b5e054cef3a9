"""What one seed of a testbed has measured so far, in a file: what is there is not measured again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_locstitch.runtime.files import write_atomically


class Record:
    """facts: what the numbers depend on; a file that was made of others is begun anew.

    began: this process's CPU time when it took up the work; what it has used since is counted.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], began: float | None = None) -> None:
        self._path = path
        plain = json.loads(json.dumps(facts))
        self.content: dict[str, Any] = {"facts": plain, "cpu_seconds": 0.0}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            self.content = found if found["facts"] == plain else self.content
        self._began = (time.process_time() if began is None else began) - self.content["cpu_seconds"]

    def get(self, part: str, name: str, measure: Callable[[], Any]) -> Any:
        """What is known under this name, or what `measure` finds now: plain data."""
        known = self.content.setdefault(part, {})
        if name not in known:
            known[name] = measure()
            self.note(cpu_seconds=time.process_time() - self._began)
            write_atomically(self._path, json.dumps(self.content))
        return known[name]

    def note(self, **facts: Any) -> None:
        """Keep what numbers are about."""
        self.content |= facts

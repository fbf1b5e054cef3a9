"""The interface of a form: what a localized checkpoint or a merge can be exported as."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_locstitch.exports.changes import Changes
    from hf_locstitch.runtime.progress import Progress


MADE_OF = "hf-locstitch"  # in the metadata of exported weights: the fingerprint of what they were made of


class Form(ABC):
    """A form of your own is one subclass in one file."""

    @abstractmethod
    def plan(self, changes: Changes) -> FormPlan:
        """What would be written, judging by headers and masks. Raises RequestError for what cannot be expressed."""


class FormPlan(ABC):
    """nbytes: of what will be written. facts: plain values for JSON."""

    nbytes: int
    facts: dict[str, Any]

    @abstractmethod
    def describe(self) -> list[str]:
        """Lines of the plan."""

    @abstractmethod
    def write(self, folder: Path, name: str, progress: Progress) -> dict[str, Any]:
        """Fill a folder, and return what only the weights tell, as plain values.

        name: of the folder or repo, for its card.
        """

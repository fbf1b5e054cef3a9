"""What verify found, as data and for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from hf_locstitch.runtime.escape import line
from hf_locstitch.runtime.human import human

Part = Literal["files", "recipe", "masks", "inputs", "values"]
SHOWN = 20  # findings shown to people; JSON holds them all


@dataclass(frozen=True)
class Finding:
    """One deviation. where: file, tensor or mask. what: its property. found, due: actual and expected value.

    warning: it does not make the check fail."""

    part: Part
    where: str
    what: str
    found: str | int
    due: str | int
    warning: bool = False

    def __str__(self) -> str:
        return " ".join(f"{self.where}: {self.what} is {self.found}, expected {self.due}".split())


@dataclass(frozen=True)
class Skipped:
    """What was not checked, and why."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


@dataclass(frozen=True)
class Checked:
    """How much was checked. tensors, of_tensors: how many tensors were recomputed, and how many there are."""

    files: int = 0
    bytes: int = 0
    masks: int = 0
    mask_elements: int = 0
    inputs: int = 0
    tensors: int = 0
    of_tensors: int = 0
    coordinates: int = 0


@dataclass
class Notes:
    """A report in the making."""

    checked: Checked = field(default_factory=Checked)
    skipped: list[Skipped] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def count(self, **counts: int) -> None:
        self.checked = replace(self.checked, **counts)

    def skip(self, what: str, why: str) -> None:
        self.skipped.append(Skipped(what, why))


@dataclass(frozen=True)
class VerifyReport:
    """ref: the merge, pinned."""

    ref: str
    method: str
    checked: Checked
    skipped: tuple[Skipped, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether all checks that could be made passed; warnings do not count."""
        return not self._failed

    @property
    def verdict(self) -> str:
        """For people: whether checks failed, or else what was not checked."""
        if failed := len(self._failed):
            return f"{failed} {'check' if failed == 1 else 'checks'} failed"
        if self.skipped:
            return f"what could be checked holds; not checked: {', '.join(skipped.what for skipped in self.skipped)}"
        return "all checks passed"

    @property
    def _failed(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.warning]

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "verdict": self.verdict, **asdict(self)}

    def describe(self, quiet: bool = False) -> str:
        """For people, one line each. quiet: only failed or skipped checks, and warnings."""
        lines = [] if quiet else self._counts()
        lines += [f"skipped    {reason}" for reason in self.skipped]
        lines += _shown("warning    ", [finding for finding in self.findings if finding.warning])
        lines += _shown("failed     ", self._failed)
        lines += [f"result     {self.verdict}"] if not self.ok or not quiet else []
        return "\n".join(map(line, lines))

    def _counts(self) -> list[str]:
        done = self.checked
        lines = [
            f"verified   {self.ref} (method {self.method})",
            f"files      {done.files} checked against locstitch.json, {human(done.bytes)}",
        ]
        if done.masks:
            lines.append(
                f"masks      {done.masks} over N = {done.mask_elements:,} elements: ones, coverage and overlaps"
            )
        if done.tensors:
            lines.append(
                f"values     {done.tensors} of {done.of_tensors} tensors, {done.coordinates:,} coordinates, "
                f"recomputed from {done.inputs} inputs"
            )
        return lines


def _shown(head: str, findings: Sequence[Finding]) -> list[str]:
    lines = [f"{head}{finding}" for finding in findings[:SHOWN]]
    if len(findings) > SHOWN:
        lines.append(f"{head}and {len(findings) - SHOWN} more; --json lists them all")
    return lines

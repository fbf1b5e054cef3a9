"""What a check found, as data and for a person to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from hf_locstitch.runtime.human import human

Part = Literal["files", "recipe", "masks", "inputs", "values"]
SHOWN = 20  # findings that a person is shown; JSON holds them all


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be. where: file, tensor or mask. warning: it hinders nobody."""

    part: Part
    where: str
    what: str
    found: str | int
    due: str | int
    warning: bool = False

    def __str__(self) -> str:
        return " ".join(f"{self.where}: {self.what} is {self.found}, should be {self.due}".split())


@dataclass(frozen=True)
class Checked:
    """How much was looked at. tensors, of_tensors: whose values were recomputed, and how many there are."""

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
    skipped: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def count(self, **counts: int) -> None:
        self.checked = replace(self.checked, **counts)


@dataclass(frozen=True)
class VerifyReport:
    """ref: the merge, pinned. skipped: what was not checked, and why."""

    ref: str
    method: str
    checked: Checked
    skipped: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether all that was checked holds; warnings do not count."""
        return all(finding.warning for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def describe(self, quiet: bool = False) -> str:
        """For a person, one line each; quiet: only what does not hold or was not checked."""
        lines = [] if quiet else self._counts()
        lines += [f"skipped    {reason}" for reason in self.skipped]
        lines += _shown("warning    ", [finding for finding in self.findings if finding.warning])
        wrong = [finding for finding in self.findings if not finding.warning]
        lines += _shown("wrong      ", wrong)
        verdict = f"{len(wrong)} {'thing does' if len(wrong) == 1 else 'things do'} not hold"
        return "\n".join([*lines, *([f"result     {verdict if wrong else 'all holds'}"] if wrong or not quiet else [])])

    def _counts(self) -> list[str]:
        done = self.checked
        lines = [
            f"verified   {self.ref} (method {self.method})",
            f"files      {done.files} against locstitch.json, {human(done.bytes)}",
        ]
        if done.masks:
            lines.append(f"masks      {done.masks} over N = {done.mask_elements:,} elements: ones, coverage, overlaps")
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

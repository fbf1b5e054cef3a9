"""What verify found, as data and for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from hf_locstitch.runtime import html
from hf_locstitch.runtime.escape import line
from hf_locstitch.runtime.human import counted, human, some

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
    """How much was checked. joint: whether the mask is one that all finetunes share. tensors, of_tensors: how many
    tensors were recomputed, and how many there are; partly: of how many only what lies outside fitted or unknown masks.
    """

    files: int = 0
    bytes: int = 0
    masks: int = 0
    joint: bool = False
    mask_elements: int = 0
    inputs: int = 0
    tensors: int = 0
    of_tensors: int = 0
    coordinates: int = 0
    partly: int = 0


@dataclass(frozen=True)
class Refitted:
    """Tensors whose values under the masks were fitted, by how these were checked. recomputed: all values. sampled:
    those of some rows. hashed: none, so that only the hash of their file speaks for them. values: recomputed ones."""

    recomputed: tuple[str, ...] = ()
    sampled: tuple[str, ...] = ()
    hashed: tuple[str, ...] = ()
    values: int = 0

    def __str__(self) -> str:
        checked = f"{counted(self.values, 'value')} recomputed" if self.values else "no value recomputed"
        parts = {"all of": self.recomputed, "some rows of": self.sampled, "by hash only": self.hashed}
        return "; ".join([checked, *(f"{how} {_tensors(names)}" for how, names in parts.items() if names)])


def _tensors(names: Sequence[str]) -> str:
    return f"{counted(len(names), 'tensor')} ({some(names)})"


@dataclass
class Notes:
    """A report in the making."""

    checked: Checked = field(default_factory=Checked)
    skipped: list[Skipped] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    refitted: Refitted | None = None

    def count(self, **counts: int) -> None:
        self.checked = replace(self.checked, **counts)

    def skip(self, what: str, why: str) -> None:
        self.skipped.append(Skipped(what, why))


@dataclass(frozen=True)
class VerifyReport:
    """ref: the merge, pinned. refitted: where values under masks were fitted, how these were checked."""

    ref: str
    method: str
    checked: Checked
    skipped: tuple[Skipped, ...]
    findings: tuple[Finding, ...]
    refitted: Refitted | None = None

    @property
    def ok(self) -> bool:
        """Whether all checks that could be made passed; warnings do not count."""
        return not self._failed

    @property
    def verdict(self) -> str:
        """For people: whether checks failed, or else what was not checked."""
        if failed := len(self._failed):
            return f"{counted(failed, 'check')} failed"
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

    def _repr_html_(self) -> str:
        """For notebooks: what `describe` says."""
        return html.page(html.summary(self.describe()))

    def _counts(self) -> list[str]:
        done = self.checked
        lines = [
            f"verified   {self.ref} (method {self.method})",
            f"files      {done.files} checked against locstitch.json, {human(done.bytes)}",
        ]
        if done.masks:
            many = "one joint mask" if done.joint else f"{done.masks}"
            lines.append(f"masks      {many} over N = {done.mask_elements:,} elements: ones, coverage and overlaps")
        if done.tensors:
            partly = f" ({done.partly} of them outside their masks)" if done.partly else ""
            lines.append(
                f"values     {done.tensors} of {counted(done.of_tensors, 'tensor')}{partly}, "
                f"{counted(done.coordinates, 'coordinate')}, recomputed from {counted(done.inputs, 'input')}"
            )
        if self.refitted is not None:
            lines.append(f"refitted   {self.refitted}")
        return lines


def _shown(head: str, findings: Sequence[Finding]) -> list[str]:
    lines = [f"{head}{finding}" for finding in findings[:SHOWN]]
    if len(findings) > SHOWN:
        lines.append(f"{head}and {len(findings) - SHOWN} more; --json lists them all")
    return lines

"""`export`: a localized checkpoint or a merge in, a folder or repo of another form out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_locstitch.engine.delivery import Delivered, Delivery, make_target
from hf_locstitch.engine.preflight import check_output_given
from hf_locstitch.engine.work_dir import WorkDir
from hf_locstitch.errors import RecipeError
from hf_locstitch.exports.changes import Changes, open_changes
from hf_locstitch.exports.form import FormPlan
from hf_locstitch.exports.forms import FORMS
from hf_locstitch.runtime.escape import line
from hf_locstitch.runtime.processes import find_processes
from hf_locstitch.runtime.progress import Progress, hide_all_library_bars
from hf_locstitch.runtime.version import __version__


@dataclass(frozen=True)
class ExportPlan:
    """What an export would do. form: its name."""

    form: str
    changes: Changes
    planned: FormPlan

    def describe(self) -> str:
        """A summary to print."""
        changes = self.changes
        head = [f"export     {changes.label}, a {changes.kind}", f"base       {changes.base.label}"]
        return "\n".join(map(line, [*head, *self.planned.describe()]))

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        pinned = {"source": self.changes.source.pinned, "base": self.changes.base.source.pinned}
        return {"form": self.form, **pinned, **self.planned.facts}

    @property
    def fingerprint(self) -> str:
        """A hash of what determines the output."""
        facts = __version__, self.form, self.changes.source.identity, self.changes.base.source.identity
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()


@dataclass(frozen=True)
class ExportResult(Delivered):
    """The result of an export.

    Attributes:
        out: The folder; None if it was only pushed.
        url: URL of the pushed repo; None if it was not pushed.
        commit: Commit of the pushed repo, 40 hex digits.
        facts: What was exported, as plain values. `inexact` is the number of weights that come out of the adapter as
            another value than in the merge.
    """

    def describe(self) -> str:
        """A summary to print."""
        inexact = self.facts["inexact"]
        exact = f"all weights but {inexact:,}, which are rounded" if inexact else "every weight, to the bit"
        return "\n".join(map(line, [*self.places("exported"), f"exact      {exact}"]))


def export(
    ref: str | Path,
    *,
    out: str | Path | None = None,
    push_to: str | None = None,
    private: bool | None = None,
    create_pr: bool | None = None,
    form: str = "peft",
    base: str | Path | None = None,
    show_progress: bool | None = None,
) -> ExportResult:
    """Turn a localized checkpoint or a merge into another form, such as a PEFT adapter over its base.

    Args:
        ref: A localized checkpoint, or a merge with masks: a folder, org/name or org/name@revision.
        out: A folder that does not exist yet. At least one of `out` and `push_to` is needed.
        push_to: A repo, org/name or org/name@branch, to push the result to, in one commit.
        private: Whether a new repo is private.
        create_pr: Whether the result is proposed there as a pull request.
        form: "peft": an adapter that `PeftModel.from_pretrained` loads.
        base: Where the base is, if not where the manifest says.
        show_progress: None shows bars on a terminal only.

    Returns:
        Where the result is, and what is in it.

    Raises:
        RequestError: If the form cannot hold it, or the base is not at hand; nothing was written.
        WorkError: If the work fails; the same call starts it again.

    Example:
        >>> export("me/math-localized", out="math-adapter").facts["inexact"]  # doctest: +SKIP
        0
    """
    place = None if out is None else Path(out)
    check_output_given(place, push_to)
    delivery = Delivery("export", place, make_target(push_to, bool(create_pr)), bool(private))
    return carry_out(plan_export(ref, form=form, base=base), delivery, Progress(show_progress))


@hide_all_library_bars()
def plan_export(ref: str | Path, *, form: str = "peft", base: str | Path | None = None) -> ExportPlan:
    """What `export` would do; reads headers and masks. Raises RequestError, and IntegrityError for a damaged mask."""
    if find_processes().count > 1:
        raise RecipeError("an export works in one process. Run it without the launcher.")
    try:
        chosen = FORMS.find(form)
    except KeyError as error:
        raise RecipeError(f"form: {error.args[0]}.") from error
    changes = open_changes(str(ref), None if base is None else str(base))
    return ExportPlan(form, changes, chosen().plan(changes))


@hide_all_library_bars()
def carry_out(
    plan: ExportPlan, delivery: Delivery, progress: Progress, announce: Callable[[], object] = lambda: None
) -> ExportResult:
    """Write the result, and publish it.

    announce: called once all is checked, before the work. Raises like `export`.
    """
    check_possible(plan, delivery)
    announce()

    def write(work: WorkDir) -> dict[str, Any]:
        plan.changes.check_rest(progress)
        return plan.planned.write(work.stage, delivery.repo, progress)

    message = f"Export {plan.changes.label} with hf-locstitch"
    found, url, commit = delivery.make(plan.fingerprint, write, message, progress)
    return ExportResult(delivery.out, url, commit, {**plan.as_json(), **found})


def check_possible(plan: ExportPlan, delivery: Delivery) -> None:
    """All that must hold before the work. Raises RequestError."""
    changes = plan.changes
    delivery.check({changes.kind: changes.source, "base": changes.base.source}, plan.planned.nbytes)

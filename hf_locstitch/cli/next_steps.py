"""The commands that come next, when one is done: as people would type them here."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_locstitch.cli.printing import PROGRAM

if TYPE_CHECKING:
    from hf_locstitch.api import MergeResult
    from hf_locstitch.checkpoints.source import Source
    from hf_locstitch.plan.plans import Plan
    from hf_locstitch.training.finetune import FinetuneResult
    from hf_locstitch.training.planning import FinetunePlan


def next_lines(commands: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a summary."""
    return [f"next       {shlex.join(command)}" for command in commands]


def after_merge(plan: Plan, result: MergeResult) -> list[list[str]]:
    """Check it, judge it; or stitch a localized checkpoint with others."""
    place = _place(result.out, result.url)
    base, inputs = ["--base", plan.recipe.base.ref], _elsewhere(plan)
    verify = [PROGRAM, "verify", place, *inputs]
    if result.manifest.is_localized:
        return [verify, [PROGRAM, "stitch", *base, "--localized", place, "REF", "--out", "DIR"]]
    if result.evaluation is not None:
        return [verify]
    compared = ["--parents"] if not inputs else [] if plan.recipe.localized or plan.adapters else inputs
    return [verify, [PROGRAM, "evaluate", place, *_judged_by(plan.base.config.get("architectures")), *compared]]


def after_evaluation(typed: Sequence[str], first: str) -> list[list[str]]:
    """Put the scores, which are cached, on the card of a merge in a folder. typed: arguments. first: the first REF."""
    from hf_locstitch.artifacts.manifest import FILE  # slow to import

    merged = (Path(first).expanduser() / FILE).is_file()
    return [[PROGRAM, *typed, "--push"]] if merged and "--push" not in typed else []


def after_finetune(plan: FinetunePlan, result: FinetuneResult) -> list[list[str]]:
    """Merge it with others."""
    place = _place(result.out, result.url)
    return [[PROGRAM, "merge", "--base", plan.request.base, "--ft", place, "REF", "--out", "DIR"]]


def _place(out: Path | None, url: str | None) -> str:
    """As a ref: the folder, or else the repo behind its URL."""
    return str(out) if out is not None else "/".join(str(url).split("/")[-2:])


def _judged_by(architectures: object) -> list[str]:
    """lm-eval judges language models; others need examples of the user's own."""
    named = architectures if isinstance(architectures, list) else []
    writes = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in named)
    return ["--suite", "quick"] if writes else ["--data", "FILE"]


def _elsewhere(plan: Plan) -> list[str]:
    """Flags that name the inputs, if one is a folder that is not where the manifest says: that keeps no paths."""
    entries = (plan.recipe.base, *plan.recipe.entries)
    found = all(
        _finds(checkpoint.source, entry.ref) for checkpoint, entry in zip(plan.inputs.values(), entries, strict=True)
    )
    return [] if found else ["--base", entries[0].ref, "--ft", *(entry.ref for entry in entries[1:])]


def _finds(source: Source, ref: str) -> bool:
    return source.repo is not None or Path(source.pinned).resolve() == Path(ref).expanduser().resolve()

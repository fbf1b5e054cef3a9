"""A plan as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hf_locstitch.checkpoints.adapter import AdapterCheckpoint
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.localizable import reach
from hf_locstitch.checkpoints.ref import could_be_repo, parse_ref
from hf_locstitch.plan.cost import estimate, files_here, fit_cost, localizing_cost
from hf_locstitch.plan.plans import ModelPlan, Plan, StitchPlan
from hf_locstitch.runtime.escape import line
from hf_locstitch.runtime.human import counted, human
from hf_locstitch.stitch import per_tensor

HINT = "--localizer joint --stitch refit keeps more of several finetunes, also without data, and takes longer"


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values, for --dry-run --json."""
    cost = estimate(plan, files_here(plan))
    return {
        "base": plan.base.source.pinned,
        "finetuned": {name: checkpoint.source.pinned for name, checkpoint in plan.finetuned.items()},
        "adapters": {
            name: {"kind": one.kind, "changes": [tensor for layer in one.layers for tensor in layer], "left": one.left}
            for name, one in plan.adapters.items()
        },
        "dequantized": plan.dequantized,
        "masks_from": {name: merge.pinned for name, merge in plan.merges.items()},
        "method": plan.recipe.method.name,
        "localizer": plan.common_localizer,
        "data": {name: found.pinned.dump() for name, found in plan.data.items()},
        "scale": plan.recipe.scale,
        "weights": dict(plan.weights),
        "N": plan.n,
        "k": plan.k,
        "localized": [tensor.name for shard in plan.shards for tensor in shard.tensors if tensor.localized],
        "kept_from_base": [t.name for shard in plan.shards for t in shard.tensors if not t.localized],
        "vocabulary": plan.vocabulary.as_json() if isinstance(plan, ModelPlan) and plan.vocabulary else None,
        "files": _files_json(plan) if isinstance(plan, ModelPlan) else None,
        "adapter": str(plan.recipe.adapter) if plan.recipe.adapter else None,
        "push_to": str(plan.recipe.target) if plan.recipe.target else None,
        "shards": {shard.file: shard.nbytes for shard in plan.shards},
        "bytes": asdict(cost),
        "localizing": localizing.as_json() if (localizing := localizing_cost(plan)) else None,
        "stitch": plan.recipe.fitting.as_record() if plan.recipe.fitting else "mean",
        "refit_data": {name: found.pinned.dump() for name, found in plan.fit_data.items()},
        "refitting": fitting.as_json() if (fitting := fit_cost(plan)) else None,
        "lineage": {name: asdict(found) for name, found in plan.lineage.items()},
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
    }


def _files_json(plan: ModelPlan) -> dict[str, Any]:
    files = plan.side_files
    return {
        "from": plan.files.source.pinned,
        "copied": list(files.copied),
        "made": list(files.made),
        "left": len(files.left),
    }


def _files(plan: ModelPlan) -> str:
    """The files that go along with the weights, and how many do not."""
    files = plan.side_files
    copied = f"from {plan.files.label}: {', '.join(files.copied)}" if files.copied else "none beside the weights"
    copied += f"; edited or of another model: {', '.join(files.made)}" if files.made else ""
    return copied + (f"; {counted(len(files.left), 'other')} left (--also-copy GLOB copies more)" if files.left else "")


def _shadowing(ref: str, checkpoint: Checkpoint) -> str:
    """A note on a folder or file that is named as a repo could be."""
    if checkpoint.source.repo is not None or not could_be_repo(ref):
        return ""
    what = "file" if parse_ref(ref).path else "folder"
    return f" (the {what} here, not the repo {ref} on the Hub; write ./{ref} for a {what})"


def _could_be_solved(plan: Plan) -> bool:
    """Whether it is the paper's merge of several finetunes, with nothing asked for beyond a density."""
    recipe = plan.recipe
    plain = recipe.method.name == "locstitch" and recipe.stitch is None and not recipe.localized
    return plain and len(plan.finetuned) > 1 and plan.settings.cache and not plan.data


def _as_adapter(checkpoint: Checkpoint) -> str:
    """A note on an adapter."""
    if not isinstance(checkpoint, AdapterCheckpoint):
        return ""
    changed = sum(map(len, checkpoint.layers))
    return f" ({checkpoint.kind} adapter, changes {counted(changed, 'tensor')} of the base)"


def _as_merged(plan: Plan, name: str) -> str:
    """A note on a finetune whose mask is taken from a merge."""
    return f" (its mask from {plan.merges[name].label})" if name in plan.merges else ""


def _as_stored(checkpoint: Checkpoint) -> str:
    """A note on quantized weights."""
    return f" (dequantized from {checkpoint.dequantized})" if checkpoint.dequantized else ""


def format_plan(plan: Plan) -> str:
    """The plan for a person to read."""
    cost = estimate(plan, files_here(plan))
    localized = sum(tensor.localized for shard in plan.shards for tensor in shard.tensors)
    kept = sum(len(shard.tensors) for shard in plan.shards) - localized
    share = 100 * plan.k / plan.n if plan.n else 0.0
    stitches = isinstance(plan, StitchPlan)
    kind = "localized" if stitches else "finetuned"
    keeps = "k =" if plan.exact_k else "up to" if stitches else "about"
    wide = max(len(name) for name in plan.finetuned)
    entries = (plan.recipe.base, *plan.recipe.entries)
    inputs = {
        name: checkpoint.label
        + _shadowing(entry.ref, checkpoint)
        + _as_adapter(checkpoint)
        + _as_stored(checkpoint)
        + _as_merged(plan, name)
        for (name, checkpoint), entry in zip(plan.inputs.items(), entries, strict=True)
    }
    reached = reach((info for _, info in plan.base.tensors.values()), [info.name for info in plan.mask_tensors])
    lines = [
        f"base       {inputs['base']}",
        *(f"{kind:<9}  {name:<{wide}}  {inputs[name]}" for name in plan.finetuned),
        f"method     {plan.recipe.method.describe()}"
        + (f", scale {plan.recipe.scale:g}" if plan.recipe.scale != 1 else ""),
        *([f"weights    {per_tensor.describe(plan.weights)}"] if plan.weights else []),
        *(
            f"localizer  {text}"
            for text in dict.fromkeys(localizer.describe() for localizer in plan.localizers.values())
        ),
        *(f"data       {name:<{wide}}  {found.describe()}" for name, found in plan.data.items()),
        *([f"stitch     {plan.recipe.stitch.describe()}"] if plan.recipe.stitch else []),
        *(f"inputs     {name:<{wide}}  {found.label}, {found.asked.split}" for name, found in plan.fit_data.items()),
        f"{'merged' if isinstance(plan, ModelPlan) else 'masked'}     N = {plan.n:,} elements in "
        f"{counted(localized, 'tensor')} ({100 * reached.share:.3g} % of the base)"
        + (f"; {'the' if plan.joint else 'each'} mask keeps {keeps} {plan.k:,} ({share:.4g} %)" if plan.masked else "")
        + (f"; {counted(kept, 'tensor')} kept from {plan.unmasked_from.label}" if isinstance(plan, ModelPlan) else ""),
        f"output     {counted(len(plan.shards), 'shard')}, {human(cost.write)}"
        f" ({', '.join(sorted({t.dtype for s in plan.shards for t in s.tensors}))})",
        *([f"vocabulary {plan.vocabulary.describe()}"] if isinstance(plan, ModelPlan) and plan.vocabulary else []),
        *([f"files      {_files(plan)}"] if isinstance(plan, ModelPlan) else []),
        *([f"adapter    to {plan.recipe.adapter}, once all is merged"] if plan.recipe.adapter else []),
        *([f"push       to {plan.recipe.target}"] if plan.recipe.target else []),
        f"cost       read {human(cost.read)} (to download: {human(cost.download)}), "
        f"disk up to {human(cost.disk)}, memory about {human(cost.memory)}",
        *(f"lineage    {name:<{wide}}  {found.describe()}" for name, found in plan.lineage.items()),
        *([localizing.describe()] if (localizing := localizing_cost(plan)) else []),
        *(fitting.describe().split("\n") if (fitting := fit_cost(plan)) else []),
        *([f"hint       {HINT}"] if _could_be_solved(plan) else []),
        *(f"note       {note}" for note in plan.notes),
        *(f"warning    {warning}" for warning in plan.warnings),
    ]
    return "\n".join(map(line, lines))

"""What a merge will take, told from its plan, and the plan as people and programs read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import ITEM_BYTES
from hf_locstitch.checkpoints.pieces import Piece, byte_ranges, most_held
from hf_locstitch.localize.estimate import describe, learning_cost
from hf_locstitch.plan import MergePlan
from hf_locstitch.refit.estimate import describe as describe_refit
from hf_locstitch.refit.estimate import refit_cost
from hf_locstitch.settings import BATCH, COMPACT_FROM, COMPACT_SLACK

SPILL_BYTES = 8  # position and |task vector| of one candidate; its value comes on top
SPILL_MARGIN = 1.25  # candidates kept per coordinate chosen; the bound is set from a sample
RISING_MARGIN = 1.05  # the same where the bound rises while files come, after tidying up; a bin of scores is .8 % wide


@dataclass(frozen=True)
class Cost:
    """All in bytes. download: what is not in the cache yet. disk: output and temporary files, at their most."""

    read: int
    download: int
    write: int
    disk: int
    memory: int


def estimate(plan: MergePlan) -> Cost:
    """What the merge will take at most; the spill is a guess that assumes no great ties at the threshold."""
    needed = plan.needed
    passes = [plan.scanned, plan.combined(plan.shards)]
    read = download = 0
    for name, checkpoint in plan.inputs.items():
        sizes = {shard.file: shard.size for shard in checkpoint.shards if shard.file in needed[name]}
        missing = {file: size for file, size in sizes.items() if checkpoint.source.cached(file) is None}
        times = [list(byte_ranges(checkpoint, pieces.get(name, ()))) for pieces in passes]
        read += sum(sizes[file] for files in ([sizes] if name in plan.given else times) for file in files)
        if plan.settings.cache or name != "base":
            download += sum(missing.values())
        else:
            download += sum(missing.get(file, 0) for files in times for file in files)
    write = sum(shard.nbytes for shard in plan.shards)
    disk = _output(plan) + _spill(plan) + _masks(plan) + (0 if plan.settings.cache else _streams(plan))
    disk += refitting.disk if (refitting := refit_cost(plan)) else 0
    memory = plan.settings.memory + (refitting.peak if refitting else 0)
    return Cost(read, download, write, disk, memory)


def _output(plan: MergePlan) -> int:
    """Finished shards are given up as soon as they are uploaded where nothing else is to keep them."""
    sizes = sorted(shard.nbytes for shard in plan.shards)
    return sum(sizes if plan.settings.cache or plan.recipe.out is not None else sizes[-3:])


def _spill(plan: MergePlan) -> int:
    if plan.given:
        return sum(4 * one.ones + one.shards[1].size for one in plan.given.values())
    if not plan.masked:
        return 0
    streamed = not plan.settings.cache or not plan.all_here
    value = max(
        (ITEM_BYTES[c.info(t).dtype] for c in plan.finetuned.values() for t in c.tensors if c.info(t).floating),
        default=4,
    )
    size = SPILL_BYTES + value
    if not streamed:
        return len(plan.finetuned) * min(plan.n, math.ceil(plan.k * SPILL_MARGIN)) * size
    live = min(plan.n, math.ceil(plan.k * RISING_MARGIN)) * size
    batch = BATCH * plan.settings.workers * plan.settings.chunk * size
    most = min(COMPACT_FROM * live + COMPACT_SLACK + batch, plan.n * size)
    return math.ceil(len(plan.finetuned) * most + live)  # one at a time is copied while it is tidied up


def _masks(plan: MergePlan) -> int:
    return len(plan.finetuned) * math.ceil(mask_bits(plan.k / plan.n) * plan.n / 8) if plan.masked and plan.n else 0


def _streams(plan: MergePlan) -> int:
    """Bytes that have come and are still to be read, in the pass that holds most of them."""
    scanned, combined = plan.scanned, plan.combined(plan.shards)
    passes = [sum(_held(plan, name, pieces[name]) for name in pieces) for pieces in (scanned, combined)]
    kept = [_bytes(plan.inputs[name], combined[name]) for name in combined if scanned and name != "base"]
    return max(passes) + sum(kept)


def _held(plan: MergePlan, name: str, pieces: Sequence[Piece]) -> int:
    checkpoint = plan.inputs[name]
    if all(checkpoint.source.cached(file) for file in byte_ranges(checkpoint, pieces)):
        return 0
    return min(most_held(checkpoint, pieces) + plan.settings.window, _bytes(checkpoint, pieces))


def _bytes(checkpoint: Checkpoint, pieces: Sequence[Piece]) -> int:
    return sum(count * ITEM_BYTES[checkpoint.info(name).dtype] for name, _, count in pieces)


def mask_bits(density: float) -> float:
    """Bits per element that a stored mask takes, about: the entropy, never above 1."""
    if density in (0.0, 1.0):
        return 0.0 if density == 0.0 else 1.0
    return min(1.0, -density * math.log2(density) - (1 - density) * math.log2(1 - density)) * 1.02


def plan_json(plan: MergePlan) -> dict[str, Any]:
    """The plan as plain JSON values, for --dry-run --json."""
    cost = estimate(plan)
    return {
        "base": plan.base.source.pinned,
        "finetuned": {name: checkpoint.source.pinned for name, checkpoint in plan.finetuned.items()},
        "method": plan.recipe.method,
        "localizer": plan.common_localizer,
        "data": {name: found.pinned.dump() for name, found in plan.data.items()},
        "scale": plan.recipe.scale,
        "N": plan.n,
        "k": plan.k,
        "localized": [tensor.name for shard in plan.shards for tensor in shard.tensors if tensor.localized],
        "kept_from_base": [t.name for shard in plan.shards for t in shard.tensors if not t.localized],
        "shards": {shard.file: shard.nbytes for shard in plan.shards},
        "bytes": asdict(cost),
        "localizing": learning.as_json() if (learning := learning_cost(plan)) else None,
        "stitch": plan.recipe.stitch.dump() if plan.recipe.stitch else "mean",
        "refit_data": {name: found.pinned.dump() for name, found in plan.refit_data.items()},
        "refitting": refitting.as_json() if (refitting := refit_cost(plan)) else None,
        "warnings": list(plan.warnings),
    }


def format_plan(plan: MergePlan) -> str:
    """The plan for a person to read."""
    cost = estimate(plan)
    localized = sum(tensor.localized for shard in plan.shards for tensor in shard.tensors)
    kept = sum(len(shard.tensors) for shard in plan.shards) - localized
    share = 100 * plan.k / plan.n if plan.n else 0.0
    kind = "localized" if plan.given else "finetuned"
    keeps = "k =" if not plan.rounded else "up to" if plan.given else "about"
    wide = max(len(name) for name in plan.finetuned)
    lines = [
        f"base       {plan.base.label}",
        *(f"{kind:<9}  {name:<{wide}}  {checkpoint.label}" for name, checkpoint in plan.finetuned.items()),
        f"method     {plan.method.title}" + (f", scale {plan.recipe.scale:g}" if plan.recipe.scale != 1 else ""),
        *(f"localizer  {how}" for how in dict.fromkeys(one.describe() for one in plan.localizers.values())),
        *(f"data       {name:<{wide}}  {found.describe()}" for name, found in plan.data.items()),
        *([f"stitch     {plan.recipe.stitch.describe()}"] if plan.recipe.stitch else []),
        *(f"inputs     {name:<{wide}}  {found.label}, {found.asked.split}" for name, found in plan.refit_data.items()),
        f"{'merged' if plan.target == 'model' else 'masked'}     N = {plan.n:,} elements in {localized} tensors"
        + (f"; each mask keeps {keeps} {plan.k:,} ({share:.4g} %)" if plan.masked else "")
        + (f"; {kept} tensors kept from {plan.rest.label}" if plan.target == "model" else ""),
        f"output     {len(plan.shards)} {'shard' if len(plan.shards) == 1 else 'shards'}, {human(cost.write)}"
        f" ({', '.join(sorted({t.dtype for s in plan.shards for t in s.tensors}))})",
        f"cost       read {human(cost.read)} (to download: {human(cost.download)}), "
        f"disk up to {human(cost.disk)}, memory about {human(cost.memory)}",
        *([describe(learning)] if (learning := learning_cost(plan)) else []),
        *([describe_refit(refitting)] if (refitting := refit_cost(plan)) else []),
        *(f"warning    {warning}" for warning in plan.warnings),
    ]
    return "\n".join(lines)


def human(nbytes: float) -> str:
    """1_234_567 -> '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"

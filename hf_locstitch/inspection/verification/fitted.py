"""The values under masks that a merge's method fitted: what they are compared with, and how much was looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_locstitch.artifacts.manifest import Manifest
from hf_locstitch.artifacts.mask_file import MaskFile, Positions
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.inspection.verification.report import Finding, Refitted

if TYPE_CHECKING:
    from torch import Tensor

Open = Callable[[Collection[str]], CheckpointReader]


def refitted_names(record: Manifest) -> frozenset[str]:
    """Tensors whose values under the masks were fitted, and are not the mean."""
    names = (record.stitch or {}).get("refitted")
    return frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()


def how_solved(stitch: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How values were solved for from task vectors alone; None if they were fitted to inputs. stitch: as recorded."""
    if "lambda" not in stitch:
        return stitch if "low_rank" in stitch else None
    begun = stitch.get("without_data")
    return begun if stitch["lambda"] == "inf" and isinstance(begun, dict) else None


@dataclass(frozen=True)
class Fit:
    """merged, inputs: open what holds some tensors, which is fetched then: of the merge; of "base" and the finetunes by
    name. order: of the finetunes in sums. masks: whose union was fitted. scale: the recipe's."""

    merged: Open
    inputs: Callable[[Collection[str]], Mapping[str, CheckpointReader]]
    order: Sequence[str]
    masks: Mapping[str, MaskFile]
    record: Manifest
    scale: float

    def compare(self, name: str, due: Tensor, slack: Tensor, places: Tensor, looked: Looked) -> Iterator[Finding]:
        """Values of a tensor on disk, flat, where masks cover these places. slack: beside rounding to its dtype."""
        import torch

        from hf_locstitch.checkpoints.tensors import TORCH_DTYPE

        reader = self.merged([name])
        info = reader.checkpoint.info(name)
        covered = torch.from_numpy(self.union(name))
        covered = covered[places[covered]]
        found, due, slack = reader.flat(name, 0, info.numel)[covered].double(), due[covered].double(), slack[covered]
        steps = torch.finfo(TORCH_DTYPE[info.dtype])
        rounding = steps.eps * due.abs().clamp(min=steps.smallest_normal)  # below which steps are no smaller
        far = ~((found - due).abs() <= slack + rounding)  # NaN is far from everything
        looked.add(name, len(covered))
        if far.any():
            first = int(far.nonzero()[0])
            index = [int(i) for i in np.unravel_index(int(covered[first]), info.shape)]
            what = f"a refitted value in {reader.where(name)} (of {len(far):,} looked at, {int(far.sum()):,} are wrong)"
            yield Finding("values", name, f"{what}, at {index},", f"{found[first]:.6g}", f"about {due[first]:.6g}")

    def covered(self, name: str) -> Tensor:
        """Where masks cover a tensor: bool [*shape]."""
        import torch

        shape = next(iter(self.masks.values())).shapes[name]
        covered = torch.zeros(math.prod(shape), dtype=torch.bool)
        covered[torch.from_numpy(self.union(name))] = True
        return covered.view(shape)

    def union(self, name: str) -> Positions:
        """Ascending positions. Raises DamagedMask."""
        files = {mask.label: mask for mask in self.masks.values()}  # a joint mask is one
        found = [mask.positions(name) for mask in files.values()]
        return found[0] if len(found) == 1 else np.unique(np.concatenate(found))


class Looked:
    """How many values of refitted tensors were looked at. ones: how many each has under the masks."""

    def __init__(self, ones: Mapping[str, int]) -> None:
        self.names = frozenset(ones)
        self._ones, self._counts = ones, dict.fromkeys(ones, 0)

    def add(self, name: str, count: int) -> None:
        self._counts[name] += count

    def report(self) -> Refitted:
        ones, counts = self._ones, self._counts
        return Refitted(
            recomputed=tuple(name for name in counts if counts[name] == ones[name]),
            sampled=tuple(name for name in counts if 0 < counts[name] < ones[name]),
            hashed=tuple(name for name in counts if not counts[name]),
            values=sum(counts.values()),
        )

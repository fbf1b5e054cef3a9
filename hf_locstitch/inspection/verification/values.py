"""The values of a merge against its inputs: recomputed directly from masks and inputs, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from hf_locstitch.artifacts.mask_file import MaskFile, Positions
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.inspection.verification.masks import positions_of
from hf_locstitch.inspection.verification.report import Finding
from hf_locstitch.runtime.dtypes import DTYPE, ON_DISK, Values

PIECE = 1 << 18  # elements checked at once
INTEGER = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
ABOVE_ALL = 1 << 31  # larger than the bits of any non-negative float32

Kept = tuple[Values, Positions]


def stitched(base: Values, finetuned: Sequence[Kept], scale: float, dtype: np.dtype[Any]) -> Values:
    """The merged values [n]. base: [n]; finetuned: of each, values [n] and kept positions [m], in summation order.

    Source: arXiv 2408.13656, section 3.3: the mean of the finetuned values where masks cover, else the base's.
    """
    merged = base.astype(dtype)
    times = np.zeros(len(base), np.uint8)
    total = np.full(len(base), -0.0)  # −0 leaves every sum unchanged, its sign too
    for values, places in finetuned:
        times[places] += 1
        total[places] += values[places].astype(np.float64)
        merged[places] = values[places].astype(dtype)
    averaged = times > (1 if scale == 1.0 else 0)
    mean = total[averaged] / times[averaged]
    if scale != 1.0:
        start = base[averaged].astype(np.float32)
        mean = start + np.float32(scale) * (mean.astype(np.float32) - start)
    merged[averaged] = mean.astype(dtype)
    return merged


def differing(left: Values, right: Values) -> Positions:
    """Positions where two arrays [n] of one dtype differ in any bit; all NaNs are equal. Returns int64 [d]."""
    integer = INTEGER[left.itemsize]
    unlike = left.view(integer) != right.view(integer)
    if _floating(left):
        unlike &= ~(np.isnan(left) & np.isnan(right))
    return np.flatnonzero(unlike)


def _floating(values: Values) -> bool:
    return values.dtype.kind not in "iub"  # bfloat16 is none of numpy's own kinds


@dataclass
class Extremes:
    """The smallest |task vector| that a mask keeps and the largest that it leaves out: float32 bits, and tensors."""

    kept: int = ABOVE_ALL
    left: int = -1
    kept_in: str = ""
    left_in: str = ""

    def add(self, tensor: str, scores: Values, places: Positions) -> None:
        """scores: float32 [n], non-negative, overwritten; places: kept positions [m]. NaN counts as the largest."""
        bits = scores.view(np.int32)
        kept = int(bits[places].min()) if len(places) else ABOVE_ALL
        bits[places] = -1
        left = int(bits.max())
        if kept < self.kept:
            self.kept, self.kept_in = kept, tensor
        if left > self.left:
            self.left, self.left_in = left, tensor

    def check(self, mask: str) -> Iterator[Finding]:
        if self.left > self.kept:
            label = f"the largest |task vector| left out (in {self.left_in})"
            due = f"at most {_float(self.kept)}, the smallest one kept (in {self.kept_in})"
            yield Finding("values", mask, label, _float(self.left), due)


def _float(bits: int) -> str:
    return f"{np.int32(bits).view(np.float32):.9g}"


@dataclass(frozen=True)
class MergeSettings:
    """How the merge was made. top_k: masks keep the largest entries of the model, of each tensor, or ("") neither.

    refitted: tensors whose values under the masks were fitted. unknown: masks whose values nobody has. Neither of these
    values are compared."""

    scale: float
    top_k: Literal["model", "tensor", ""]
    refitted: Collection[str] = ()
    unknown: Collection[str] = ()


@dataclass
class ValueCheck:
    """merged, base, rest, finetuned, ranked: open readers; finetuned in summation order, by the names of their masks.

    rest: provides the tensors that are not localized. finetuned: what the values under the masks are of. ranked: the
    whole finetuned models at hand, which tell whether masks keep the largest entries. partly: tensors of which only the
    values outside fitted or unknown masks were compared.
    """

    merged: CheckpointReader
    base: CheckpointReader
    rest: CheckpointReader
    finetuned: Mapping[str, CheckpointReader]
    ranked: Mapping[str, CheckpointReader]
    masks: Mapping[str, MaskFile]
    settings: MergeSettings
    coordinates: int = 0
    partly: set[str] = field(default_factory=set)
    extremes: dict[str, Extremes] = field(default_factory=dict)

    def localized(self, tensor: str) -> Iterator[Finding]:
        """Check a localized tensor: its values, and that the masks keep the largest entries. Raises DamagedMask."""
        inputs = {"base": self.base, **self.ranked, **self.finetuned}
        shape = self.merged.checkpoint.info(tensor).shape
        if unlike := list(_unlike_inputs(tensor, shape, inputs)):
            yield from unlike
            return
        places = positions_of(self.masks, tensor)
        wrong = Differences(tensor, self.merged.where(tensor), shape)
        for first in range(0, math.prod(shape), PIECE):
            self._piece(tensor, first, places, wrong)
        yield from wrong.findings()
        if self.settings.top_k == "tensor":
            yield from self.kept_the_largest()
            self.extremes.clear()

    def kept_the_largest(self) -> Iterator[Finding]:
        """Whether masks keep the largest entries of the tensors checked so far that compete with one another."""
        for name, extremes in self.extremes.items():
            yield from extremes.check(self.masks[name].label)

    def _piece(self, tensor: str, first: int, places: Mapping[str, Positions], wrong: Differences) -> None:
        info = self.merged.checkpoint.info(tensor)
        count = min(PIECE, info.numel - first)
        kept = {name: _within(found, first, count) for name, found in places.items()}
        base = self.base.values(tensor, first, count)
        values = {name: reader.values(tensor, first, count) for name, reader in self.finetuned.items()}
        for name, reader in self.ranked.items() if self.settings.top_k else ():
            whole = values[name] if reader is self.finetuned.get(name) else reader.values(tensor, first, count)
            scores = np.abs(whole.astype(np.float32) - base.astype(np.float32))
            self.extremes.setdefault(name, Extremes()).add(tensor, scores, kept[name])
        finetuned = [(own, kept[name]) for name, own in values.items()]
        due = stitched(base, finetuned, self.settings.scale, DTYPE[info.dtype])
        got = self.merged.values(tensor, first, count)
        fitted = kept if tensor in self.settings.refitted else {name: kept[name] for name in self.settings.unknown}
        left_out = np.unique(np.concatenate([*fitted.values(), np.empty(0, np.int64)]))
        if len(left_out):
            got = got.copy()
            got[left_out] = due[left_out]
            self.partly.add(tensor)
        wrong.compare(got, due, first)
        self.coordinates += count - len(left_out)
        for reader in (self.merged, self.base, *self.finetuned.values(), *self.ranked.values()):
            reader.release(tensor, first, count)

    def other(self, tensor: str) -> Iterator[Finding]:
        """Check a tensor that is not localized: the values of `rest`, cast to the merge's dtype."""
        got, due = self.merged.checkpoint.info(tensor), self.rest.checkpoint.info(tensor)
        wrong = Differences(tensor, self.merged.where(tensor), got.shape)
        for first in range(0, got.numel, PIECE):
            count = min(PIECE, got.numel - first)
            if got.floating:
                values = self.rest.values(tensor, first, count).astype(DTYPE[got.dtype])
                wrong.compare(self.merged.values(tensor, first, count), values, first)
            else:
                item = got.nbytes // got.numel
                wrong.compare(
                    _raw(self.merged, got, first, count, item), _raw(self.rest, due, first, count, item), first
                )
            self.coordinates += count
            for reader in (self.merged, self.rest):
                reader.release(tensor, first, count)
        yield from wrong.findings()


def _within(positions: Positions, first: int, count: int) -> Positions:
    """Those of ascending positions that lie in first … first + count, from there."""
    begin, end = np.searchsorted(positions, [first, first + count])
    return positions[begin:end] - first


def _raw(reader: CheckpointReader, info: TensorInfo, first: int, count: int, item: int) -> Values:
    """Elements of any dtype, each as one integer [count], or as bytes where no integer has its size."""
    raw = reader.raw(info.name, first * item, (first + count) * item)
    return np.frombuffer(raw, INTEGER.get(item, np.uint8))


@dataclass
class Differences:
    """How many values of a tensor are wrong, and the first of them."""

    tensor: str
    file: str
    shape: tuple[int, ...]
    count: int = 0
    first: tuple[int, str, str] | None = None

    def compare(self, got: Values, due: Values, start: int) -> None:
        """got, due: [n], the first at index `start` of the tensor."""
        places = differing(got, due)
        if len(places) and self.first is None:
            at = int(places[0])
            number = float if _floating(got) else int
            self.first = start + at, repr(number(got[at])), repr(number(due[at]))
        self.count += len(places)

    def findings(self) -> Iterator[Finding]:
        if self.first is not None:
            at, got, due = self.first
            index = [int(i) for i in np.unravel_index(at, self.shape)]
            which = f"{self.count} of {math.prod(self.shape)} values are wrong in {self.file}; the first, at"
            yield Finding("values", self.tensor, f"{which} {index},", got, due)


def _unlike_inputs(tensor: str, shape: tuple[int, ...], inputs: Mapping[str, CheckpointReader]) -> Iterator[Finding]:
    for name, reader in inputs.items():
        if tensor not in reader.checkpoint.tensors:
            yield Finding(
                "values", tensor, f"the tensor of {name} ({reader.checkpoint.label})", "absent", str(list(shape))
            )
        elif (got := reader.checkpoint.info(tensor)).shape != shape or not got.floating:
            actual = f"{got.dtype} {list(got.shape)}"
            expected = f"floating-point {list(shape)}, as in the merge"
            yield Finding("values", tensor, f"the tensor of {name} ({reader.checkpoint.label})", actual, expected)


def check_layout(
    merged: Checkpoint, base: Checkpoint, rest: Checkpoint, localized: frozenset[str], dtype: str
) -> Iterator[Finding]:
    """Names, dtypes and shapes of all tensors, from the headers."""
    for name in sorted(merged.tensors.keys() | rest.tensors.keys()):
        source = base if name in localized else rest
        actual = _kind(merged.info(name)) if name in merged.tensors else "absent"
        known = base.info(name) if name in base.tensors else None
        expected = _kind(source.info(name), _dtype_due(known, dtype)) if name in source.tensors else "absent"
        if actual != expected:
            yield Finding("values", name, "the tensor in the merge", actual, f"{expected} as in {source.label}")


def _dtype_due(known: TensorInfo | None, dtype: str) -> str | None:
    """The dtype of a floating-point tensor in the merge; None: its own. known: it in the base. dtype: the recipe's."""
    if dtype != "auto":
        return ON_DISK[dtype]
    return known.dtype if known is not None and known.floating else None


def _kind(info: TensorInfo, dtype: str | None = None) -> str:
    """dtype: what it is cast to if it is floating-point."""
    return f"{dtype if dtype and info.floating else info.dtype} {list(info.shape)}"

"""Whether values are finite: those of a checkpoint, and those to be written in a narrower dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.errors import NonFiniteError
from hf_locstitch.runtime.chunks import Chunk, chunks_of
from hf_locstitch.runtime.dtypes import DTYPE, ON_DISK, Values
from hf_locstitch.runtime.kernels import bits


def all_finite(values: Values) -> bool:
    """Whether no value [n] is NaN or infinite; several times faster than numpy's isfinite for the narrow dtypes."""
    if values.dtype == np.float64:
        return bool(np.isfinite(values).all())
    infinity = {DTYPE["F32"]: 0x7F800000, DTYPE["BF16"]: 0x7F80, DTYPE["F16"]: 0x7C00}[values.dtype]
    without_sign = bits(values) & np.iinfo(bits(values).dtype).max // 2
    return len(values) == 0 or int(without_sign.max()) < infinity


@np.errstate(invalid="ignore")  # numpy warns of signalling NaN in the narrow dtypes
def check_finite(reader: CheckpointReader, name: str, chunk: Chunk, values: Values) -> None:
    """Raises NonFiniteError if the chunk's values [n] hold NaN or infinity."""
    if all_finite(values):
        return
    first = int(np.flatnonzero(~np.isfinite(values))[0])
    kind = "NaN" if np.isnan(values[first]) else "infinity"
    raise NonFiniteError(
        f"{name} in {reader.where(name)} holds {kind} at flat index {chunk.first + first} of "
        f"{reader.checkpoint.info(name).numel}. The checkpoint is damaged, or was saved in too narrow a dtype; "
        "--allow-non-finite lets such values through."
    )


def check_part(reader: CheckpointReader, name: str, first: int, count: int) -> None:
    """Raises NonFiniteError if elements first … first + count of a tensor hold NaN or infinity."""
    for piece in chunks_of([count]):
        chunk = replace(piece, first=first + piece.first)
        check_finite(reader, name, chunk, reader.values(name, chunk.first, chunk.count))


@np.errstate(invalid="ignore")
def check_fits(tensor: str, chunk: Chunk, values: Values, exact: Callable[[], Values]) -> None:
    """Raises NonFiniteError if values [n] to be written hold NaN or infinity. exact: the same in float64."""
    if all_finite(values):
        return
    first = int(np.flatnonzero(~np.isfinite(values))[0])
    due, at = float(exact()[first]), f"flat index {chunk.first + first}"
    dtype = next(name for name, on_disk in ON_DISK.items() if DTYPE[on_disk] == values.dtype)
    if np.isfinite(due):
        raise NonFiniteError(
            f"{tensor}: the value {due:g} at {at} is beyond the range of {dtype} and would become infinity. Write the "
            "model in a wider dtype, such as --dtype bfloat16 or float32; --allow-non-finite lets such values through."
        )
    raise NonFiniteError(
        f"{tensor}: the value to be written at {at} is {'NaN' if np.isnan(due) else 'infinity'}. An input is damaged, "
        "or was saved in too narrow a dtype; --allow-non-finite lets such values through."
    )

"""The dtypes of safetensors: their sizes, and what numpy and torch call them.

Merging is done in numpy; torch is imported only where models are run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]  # of any of these dtypes

DTYPE: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
# Including those that are only copied, never computed with.
ITEM_BYTES: Mapping[str, int] = {name: dtype.itemsize for name, dtype in DTYPE.items()} | {
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U64": 8, "U32": 4, "U16": 2, "C64": 8,
}  # fmt: skip
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
ON_DISK = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}  # torch's names


def common_dtype(names: Collection[str]) -> np.dtype[Any]:
    """A dtype that holds every value of these floating-point dtypes; float32 if there are none."""
    if len(set(names)) == 1:
        return DTYPE[next(iter(names))]
    return DTYPE["F64" if "F64" in names else "F32"]

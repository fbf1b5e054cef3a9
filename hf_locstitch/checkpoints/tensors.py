"""Elements of checkpoints as torch's tensors, for whoever runs models or compares them on a device."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from hf_locstitch.checkpoints.dtypes import DTYPE, Values

# Checkpoints are read-only and so is every use of such a tensor; a filter local to the call is not thread-safe.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

TORCH_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_TORCH = {DTYPE[name]: dtype for name, dtype in TORCH_DTYPE.items()}


def as_tensor(values: Values) -> torch.Tensor:
    """The same memory. values: [n]; if they are read-only, so is every use of the tensor."""
    dtype = _TORCH[values.dtype]
    return torch.frombuffer(values.view(np.uint8).data, dtype=dtype) if len(values) else torch.empty(0, dtype=dtype)

"""Elements of checkpoints as torch tensors, to run models or compare them on a device."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from hf_locstitch.runtime.dtypes import DTYPE, Values

# Checkpoints are read-only and so is every use of such a tensor; a filter local to the call is not thread-safe.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

TORCH_DTYPE: Mapping[str, torch.dtype] = {name: getattr(torch, dtype.name) for name, dtype in DTYPE.items()}
PIECE = 1 << 20  # elements processed at once
_TORCH = {DTYPE[name]: dtype for name, dtype in TORCH_DTYPE.items()}


def as_tensor(values: Values) -> torch.Tensor:
    """The same memory. values: [n]; if they are read-only, so is every use of the tensor."""
    dtype = _TORCH[values.dtype]
    return torch.frombuffer(values.view(np.uint8).data, dtype=dtype) if len(values) else torch.empty(0, dtype=dtype)


def pieces(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """A tensor [*shape] as flat views of at most PIECE elements."""
    return tensor.reshape(-1).split(PIECE) if tensor.numel() else ()

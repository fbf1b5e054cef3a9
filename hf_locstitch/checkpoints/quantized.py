"""Quantized weights, told from names and dtypes in headers, where no config says so."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hf_locstitch.checkpoints.header import TensorInfo

# What quantizers store beside or instead of a weight: GPTQ and AWQ; FP8 of DeepSeek, compressed-tensors; bitsandbytes.
COMPANIONS = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_scale(_inv|_2)?|weight_packed|weight_zero_point|weight_g_idx|input_scale|SCB|"
    r"weight_format|(weight\.)?(nested_)?(absmax|quant_map)|weight\.quant_state\.\w+)$"
)
NARROW = re.compile(r"F[468](_|$)")  # F8_E4M3, F6_E2M3, F4
PACKED = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})  # of a weight matrix; whole numbers else are state


def quantized_tensor(tensors: Iterable[TensorInfo]) -> TensorInfo | None:
    """The first tensor that shows that the weights are quantized; None if none does."""
    return next((info for info in tensors if _is_quantized(info)), None)


def _is_quantized(info: TensorInfo) -> bool:
    packed = info.dtype in PACKED and len(info.shape) >= 2 and info.name.endswith(("weight", "_proj", "_blocks"))
    return bool(NARROW.match(info.dtype)) or packed or COMPANIONS.search(info.name) is not None

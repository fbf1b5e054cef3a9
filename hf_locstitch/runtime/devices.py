"""Devices: their names, as torch knows them, and what they can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import StringConstraints

if TYPE_CHECKING:
    import torch

AUTO, CPU = "auto", "cpu"
DeviceName = Annotated[str, StringConstraints(pattern=r"^[a-z]+(:\d+)?$")]


def has_float64(device: torch.device) -> bool:
    """Whether a device that is here computes in float64: Apple's GPUs do not, nor do some of Intel's."""
    import torch

    return device.type != "mps" and (device.type != "xpu" or torch.xpu.get_device_properties(device).has_fp64)


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """The same values in float64, on the CPU where their own device has none."""
    return (values if has_float64(values.device) else values.cpu()).double()

"""Ways to determine the values under masks other than the mean, one file each (entry points hf_locstitch.stitchers)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_locstitch.runtime.registry import Registry

if TYPE_CHECKING:
    from hf_locstitch.stitch.fitting import Stitcher

STITCHERS: Registry[Stitcher] = Registry(__name__, __path__, "hf_locstitch.stitchers")
MEAN = "mean"  # of the finetuned values: used without a stitcher

"""The metrics, one file each, and those of other packages (entry points hf_locstitch.metrics)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_locstitch.runtime.registry import Registry

if TYPE_CHECKING:
    from hf_locstitch.tasks.metric import Metric

METRICS: Registry[Metric] = Registry(__name__, __path__, "hf_locstitch.metrics")

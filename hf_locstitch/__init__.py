"""Merge finetuned models by Localize-and-Stitch, streamed from the Hugging Face Hub and back to it.

Source of the method: He et al., "Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic",
TMLR 2025, https://arxiv.org/abs/2408.13656.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_locstitch._version import __version__

if TYPE_CHECKING:
    from hf_locstitch.api import MergeResult, localize_from_hub, merge_from_hub, stitch_from_hub
    from hf_locstitch.errors import LocstitchError, RequestError, WorkError
    from hf_locstitch.evaluation.main import evaluate
    from hf_locstitch.evaluation.report import EvaluationReport
    from hf_locstitch.inspection import Inspection, inspect
    from hf_locstitch.localize.magnitude import Magnitude
    from hf_locstitch.localize.mask import Mask
    from hf_locstitch.localize.saliency import Saliency
    from hf_locstitch.localized.checkpoint import LocalizedCheckpoint, load_localized
    from hf_locstitch.masks import load_mask
    from hf_locstitch.refit.config import Refit, RegMean
    from hf_locstitch.verification.main import verify
    from hf_locstitch.verification.report import VerifyReport

__all__ = [
    "EvaluationReport",
    "Inspection",
    "LocalizedCheckpoint",
    "LocstitchError",
    "Magnitude",
    "Mask",
    "MergeResult",
    "Refit",
    "RegMean",
    "RequestError",
    "Saliency",
    "VerifyReport",
    "WorkError",
    "__version__",
    "evaluate",
    "inspect",
    "load_localized",
    "load_mask",
    "localize_from_hub",
    "merge_from_hub",
    "stitch_from_hub",
    "verify",
]

_HOME = {
    "EvaluationReport": "evaluation.report",
    "Inspection": "inspection",
    "LocalizedCheckpoint": "localized.checkpoint",
    "LocstitchError": "errors",
    "Magnitude": "localize.magnitude",
    "Mask": "localize.mask",
    "MergeResult": "api",
    "Refit": "refit.config",
    "RegMean": "refit.config",
    "RequestError": "errors",
    "Saliency": "localize.saliency",
    "VerifyReport": "verification.report",
    "WorkError": "errors",
    "evaluate": "evaluation.main",
    "inspect": "inspection",
    "load_localized": "localized.checkpoint",
    "load_mask": "masks",
    "localize_from_hub": "api",
    "merge_from_hub": "api",
    "stitch_from_hub": "api",
    "verify": "verification.main",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `hf-locstitch --help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

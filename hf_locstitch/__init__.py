"""Merge finetuned models by Localize-and-Stitch, streamed from the Hugging Face Hub and back to it.

Source of the method: He et al., "Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic",
TMLR 2025, https://arxiv.org/abs/2408.13656.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_locstitch.api import (
        MergeResult,
        localize_from_hub,
        merge_from_hub,
        plan_merge,
        stitch_from_hub,
    )
    from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint, load_localized
    from hf_locstitch.artifacts.mask_file import load_mask
    from hf_locstitch.comparison.compare import compare
    from hf_locstitch.comparison.report import ComparisonReport
    from hf_locstitch.errors import LocstitchError, RequestError, WorkError
    from hf_locstitch.evaluation.evaluate import evaluate
    from hf_locstitch.evaluation.report import EvaluationReport
    from hf_locstitch.exports.export import ExportResult, export
    from hf_locstitch.inspection.inspect import Inspection, inspect
    from hf_locstitch.inspection.task_vector import task_vector
    from hf_locstitch.inspection.verification.report import VerifyReport
    from hf_locstitch.inspection.verification.verify import verify
    from hf_locstitch.localize.localizers.joint import Joint
    from hf_locstitch.localize.localizers.magnitude import Magnitude
    from hf_locstitch.localize.localizers.mask import Mask
    from hf_locstitch.localize.localizers.saliency import Saliency
    from hf_locstitch.runtime.version import __version__
    from hf_locstitch.stitch.methods.regmean import RegMean
    from hf_locstitch.stitch.stitchers.refit import Refit
    from hf_locstitch.training.finetune import FinetuneResult, finetune

__all__ = [
    "ComparisonReport",
    "EvaluationReport",
    "ExportResult",
    "FinetuneResult",
    "Inspection",
    "Joint",
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
    "compare",
    "evaluate",
    "export",
    "finetune",
    "inspect",
    "load_localized",
    "load_mask",
    "localize_from_hub",
    "merge_from_hub",
    "plan_merge",
    "stitch_from_hub",
    "task_vector",
    "verify",
]

_HOME = {
    "ComparisonReport": "comparison.report",
    "EvaluationReport": "evaluation.report",
    "ExportResult": "exports.export",
    "FinetuneResult": "training.finetune",
    "Inspection": "inspection.inspect",
    "Joint": "localize.localizers.joint",
    "LocalizedCheckpoint": "artifacts.localized_checkpoint",
    "LocstitchError": "errors",
    "Magnitude": "localize.localizers.magnitude",
    "Mask": "localize.localizers.mask",
    "MergeResult": "api",
    "Refit": "stitch.stitchers.refit",
    "RegMean": "stitch.methods.regmean",
    "RequestError": "errors",
    "Saliency": "localize.localizers.saliency",
    "VerifyReport": "inspection.verification.report",
    "WorkError": "errors",
    "__version__": "runtime.version",
    "compare": "comparison.compare",
    "evaluate": "evaluation.evaluate",
    "export": "exports.export",
    "finetune": "training.finetune",
    "inspect": "inspection.inspect",
    "load_localized": "artifacts.localized_checkpoint",
    "load_mask": "artifacts.mask_file",
    "localize_from_hub": "api",
    "merge_from_hub": "api",
    "plan_merge": "api",
    "stitch_from_hub": "api",
    "task_vector": "inspection.task_vector",
    "verify": "inspection.verification.verify",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `hf-locstitch --help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

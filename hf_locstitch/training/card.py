"""The model card of a finetune."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from markupsafe import Markup

from hf_locstitch.report.card import data_link, licence_of, pipeline_tag, source_link
from hf_locstitch.report.page import template
from hf_locstitch.runtime.files import write_text
from hf_locstitch.runtime.human import counted
from hf_locstitch.runtime.version import __version__
from hf_locstitch.training.planning import FinetunePlan

TEMPLATE = Path(__file__).parent / "templates" / "finetune.md"


def write_card(path: Path, plan: FinetunePlan, facts: dict[str, Any], repo: str) -> None:
    """facts: of the training. repo: what the result is called."""
    base, asked, rank = plan.base, plan.data.asked, plan.request.lora
    libraries = ("torch", "transformers", *(["peft"] if rank else []))
    text = template(TEMPLATE).render(
        card_data=Markup(_card_data(plan).to_yaml()),
        title=repo.rpartition("/")[2] if repo != "DIR" else "A finetune",
        base=source_link(base.source),
        base_ref=base.source.repo or "BASE",
        licence=licence_of(base.card),
        data=data_link(plan.data),
        described=f"split {asked.split}, up to {counted(asked.number, 'example')}, or of each class, seed {asked.seed}",
        rank=rank,
        settings=plan.settings(),
        facts=facts,
        repo=repo,
        made_with=", ".join([f"hf-locstitch {__version__}", *(f"{name} {version(name)}" for name in libraries)]),
    )
    write_text(path, text)


def _card_data(plan: FinetunePlan) -> ModelCardData:
    """Metadata. A local base is left out of `base_model`, which names repos."""
    base, adapter = plan.base, plan.request.lora is not None
    optional: dict[str, Any] = {
        "license": base.card.get("license"),
        "pipeline_tag": pipeline_tag(base),
        "base_model": base.source.repo,
        "datasets": [plan.data.repo] if plan.data.repo else None,
    }
    if base.source.repo is not None:
        optional["base_model_relation"] = "adapter" if adapter else "finetune"
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        tags=["hf-locstitch", "finetune"],
        **{key: value for key, value in optional.items() if value is not None},
    )

"""The model card of an exported adapter."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData
from markupsafe import Markup

from hf_locstitch.report.card import licence_of, pipeline_tag, source_link
from hf_locstitch.report.page import template
from hf_locstitch.runtime.files import write_text
from hf_locstitch.runtime.human import human
from hf_locstitch.runtime.version import __version__

if TYPE_CHECKING:
    from hf_locstitch.exports.adapter_layout import AdapterLayout
    from hf_locstitch.exports.changes import Changes

TEMPLATE = Path(__file__).parent / "templates" / "adapter.md"


def write_card(
    path: Path, changes: Changes, layout: AdapterLayout, facts: Mapping[str, Any], name: str, inexact: int
) -> None:
    """facts: of the plan. name: of the folder or repo. inexact: how many weights PEFT rounds otherwise."""
    base = changes.base
    finetunes = " + ".join(entry.name for entry in changes.record.inputs if entry.role != "base")
    text = template(TEMPLATE).render(
        card_data=Markup(card_data(changes).to_yaml()),
        kind=changes.kind,
        method=changes.record.method,
        finetunes=finetunes,
        rows=[
            ("base", source_link(base.source), licence_of(base.card)),
            (changes.kind, source_link(changes.source), licence_of(changes.card)),
        ],
        facts=facts,
        sizes=[human(facts["bytes"]), human(facts["base_bytes"])],
        why=layout.why,
        whole_size=human(layout.whole_bytes),
        inexact=inexact,
        dtypes=", ".join(sorted({base.info(tensor).dtype for tensor in changes.ones})),
        title=name.rpartition("/")[2] if "/" in name else f"{finetunes}, as a PEFT adapter",
        repo=name,
        base=base.source.repo or "BASE",
        commit=base.source.commit,
        made_with=f"hf-locstitch {__version__}, peft {version('peft')}",
    )
    write_text(path, text)


def card_data(changes: Changes) -> ModelCardData:
    """Metadata. A local base is left out of `base_model`, which names repos."""
    base = changes.base
    optional: dict[str, Any] = {
        "license": changes.card.get("license") or base.card.get("license"),
        "pipeline_tag": pipeline_tag(base),
        "base_model": base.source.repo,
    }
    if base.source.repo is not None:
        optional["base_model_relation"] = "adapter"
    return ModelCardData(
        library_name="peft",
        tags=["hf-locstitch", "localize-and-stitch", "shira"],
        **{key: value for key, value in optional.items() if value is not None},
    )

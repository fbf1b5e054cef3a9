"""The model card: metadata that the Hub understands, and a page that a person does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.data.sets import OpenSet
from hf_locstitch.manifest import Manifest
from hf_locstitch.plan import MergePlan

NON_COMMERCIAL = re.compile(r"(^|[^a-z])(nc|non-?commercial|research)([^a-z]|$)", re.IGNORECASE)
TEMPLATE = Path(__file__).parent / "templates" / "card.md"


def card_data(plan: MergePlan) -> ModelCardData:
    """Metadata. Local folders are no repos: they are left out of `base_model`."""
    model = plan.target == "model"
    repos = [repo for name in plan.inputs if (repo := _repo(plan, name)) is not None]
    optional: dict[str, Any] = {"license": licence(plan), "pipeline_tag": pipeline_tag(plan.files) if model else None}
    sets = [found.repo for found in (*plan.data.values(), *plan.refit_data.values()) if found.repo is not None]
    if sets:
        optional["datasets"] = list(dict.fromkeys(sets))
    if repos:
        optional |= {"base_model": list(dict.fromkeys(repos)), "base_model_relation": "merge" if model else "adapter"}
    return ModelCardData(
        library_name="transformers" if model else "hf-locstitch",
        tags=[
            "merge" if model else "localized-checkpoint",
            "hf-locstitch",
            *(["localize-and-stitch"] if plan.recipe.method == "locstitch" else []),
        ],
        **{key: value for key, value in optional.items() if value is not None},
    )


def _repo(plan: MergePlan, name: str) -> str | None:
    """org/name of an input; of a local localized checkpoint that of the finetune it was made from."""
    repo = plan.inputs[name].source.repo
    if repo is None and name in plan.given and plan.given[name].finetuned.commit is not None:
        return plan.given[name].finetuned.ref.partition("@")[0]
    return repo


def licence(plan: MergePlan) -> str | None:
    """The parents' common licence; "other" where they differ, none where none is named."""
    licences = {str(checkpoint.card.get("license")) for checkpoint in plan.inputs.values()} - {"None"}
    return licences.pop() if len(licences) == 1 else "other" if licences else None


def licence_of(checkpoint: Checkpoint) -> str:
    """For people: the Hub's identifier, and the licence's own name where that says only "other"."""
    licence, name = checkpoint.card.get("license"), checkpoint.card.get("license_name")
    return f"{licence} ({name})" if licence and name else str(licence or "not named")


def licence_note(plan: MergePlan) -> str:
    """What the parents' licences mean for the merge; nothing if all are alike and allow commercial use."""
    licences = {name: licence_of(checkpoint) for name, checkpoint in plan.inputs.items()}
    notes = ["The parents' differ, and a merge is bound by all of them."] if len(set(licences.values())) > 1 else []
    if closed := [f"{name} ({licence})" for name, licence in licences.items() if NON_COMMERCIAL.search(licence)]:
        notes.append(f"Not for commercial use, because of {', '.join(closed)}.")
    return " ".join(notes)


def settings(plan: MergePlan, record: Manifest) -> dict[str, str]:
    """Every setting of the merge in words, Markdown."""
    recipe, model = plan.recipe, plan.target == "model"
    localizers = dict.fromkeys(localizer.describe() for localizer in plan.localizers.values())
    of_model = {
        "other tensors": "the base's" if plan.rest is plan.base else f"{recipe.rest_from}'s",
        "config and tokenizer": "the base's" if plan.files is plan.base else f"{plan.files.label}'s",
    }
    rows = {
        **({"method": f"`{recipe.method}` ({plan.method.title})"} if model else {}),
        **({"localizer": "; ".join(localizers)} if localizers else {}),
        **({"stitch": recipe.stitch.describe()} if recipe.stitch else {}),
        **({"scale": f"{record.scale:g}"} if model else {}),
        "merged tensors" if model else "localized tensors": f"{len(plan.localized)}, {record.N:,} elements",
        **({"include": _globs(recipe.include)} if recipe.include else {}),
        **({"exclude": _globs(recipe.exclude)} if recipe.exclude else {}),
        **(of_model if model else {}),
        "dtype": ", ".join(sorted({tensor.dtype for shard in plan.shards for tensor in shard.tensors})),
        "made with": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    return {key: value.replace("|", "\\|") for key, value in {"hf-locstitch": record.hf_locstitch, **rows}.items()}


def _globs(globs: Sequence[str]) -> str:
    return ", ".join(f"`{glob}`" for glob in globs)


def pipeline_tag(checkpoint: Checkpoint) -> str | None:
    if tag := checkpoint.card.get("pipeline_tag"):
        return str(tag)
    architectures = checkpoint.config.get("architectures") or [""]
    return "text-generation" if str(architectures[0]).endswith("ForCausalLM") else None


def auto_class(checkpoint: Checkpoint) -> str:
    """The transformers class that loads the model, as far as its config tells."""
    architecture = str((checkpoint.config.get("architectures") or [""])[0])
    heads = {
        "ForCausalLM": "AutoModelForCausalLM",
        "ForMaskedLM": "AutoModelForMaskedLM",
        "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
        "ForSequenceClassification": "AutoModelForSequenceClassification",
        "ForImageClassification": "AutoModelForImageClassification",
    }
    return next((auto for ending, auto in heads.items() if architecture.endswith(ending)), "AutoModel")


def write_card(plan: MergePlan, record: Manifest, path: Path, figures: Sequence[str] = ()) -> None:
    """README.md of a merge or a localized checkpoint. figures: stems of the pictures beside it."""
    title = " + ".join(plan.finetuned) + (", localized" if plan.target == "localized" else "")
    card = ModelCard.from_template(
        card_data(plan),
        template_path=str(TEMPLATE),
        title=title,
        repo=plan.recipe.push_to or "DIR",
        auto_class=auto_class(plan.files),
        plan=plan,
        record=record,
        figures=figures,
        links={name: _link(plan, name) for name in plan.inputs},
        licences={name: licence_of(checkpoint) for name, checkpoint in plan.inputs.items()},
        licence_note=licence_note(plan),
        settings=settings(plan, record),
        data_links={name: data_link(found) for name, found in plan.data.items()},
        refit_links={name: data_link(found) for name, found in plan.refit_data.items()},
        first=next(iter(plan.finetuned)),
        rest="the base's" if plan.rest is plan.base else f"{plan.recipe.rest_from}'s",
    )
    card.save(path)


def data_link(found: OpenSet) -> str:
    if found.repo is None:
        return f"local file `{found.pinned.ref}`"
    at = f"[{found.repo}](https://huggingface.co/datasets/{found.repo}/tree/{found.commit})"
    return f"{at} ({found.config})" if found.config else at


def _link(plan: MergePlan, name: str) -> str:
    source = plan.inputs[name].source
    through = f", localized from `{plan.origins[name]}`" if name in plan.given else ""
    if source.repo is None:
        return f"local folder `{source.pinned}`{through}"
    at = f"[{source.repo}](https://huggingface.co/{source.repo}/tree/{source.commit}) at `{(source.commit or '')[:7]}`"
    return at + through

"""The model card: metadata for the Hub, and a page for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, constants
from markupsafe import Markup

from hf_locstitch.artifacts.manifest import JOINT, RECIPE_FILE, Manifest, told
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.config import architecture
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.plan.plans import LocalizePlan, ModelPlan, Plan, StitchPlan
from hf_locstitch.plan.push_target import MAIN
from hf_locstitch.report.figures.survey import FOLDER, LAYERS
from hf_locstitch.report.page import picture, template
from hf_locstitch.report.usage import Usage, usage_in
from hf_locstitch.runtime.escape import code, fenced, link, markdown
from hf_locstitch.runtime.files import write_text
from hf_locstitch.stitch import per_tensor
from hf_locstitch.tasks.sets import OpenSet

NON_COMMERCIAL = re.compile(r"(^|[^a-z])(nc|non-?commercial|research)([^a-z]|$)", re.IGNORECASE)
TEMPLATE = Path(__file__).parent / "templates" / "card.md"
USAGE = TEMPLATE.with_name("usage.md")
HERE = "DIR"  # stands for the folder of what was not pushed
TOP, ALT = f"{LAYERS}.png", "The layers in which the ones of each mask lie, beside an even spread"


def card_data(plan: Plan) -> ModelCardData:
    """Metadata. Local folders are left out of `base_model`, which names repos."""
    model = isinstance(plan, ModelPlan)
    repos = [repo for name in plan.inputs if (repo := _repo(plan, name)) is not None]
    optional: dict[str, Any] = {
        "license": licence(plan),
        "pipeline_tag": pipeline_tag(plan.files) if isinstance(plan, ModelPlan) else None,
    }
    sets = [found.repo for found in (*plan.data.values(), *plan.fit_data.values()) if found.repo is not None]
    if sets:
        optional["datasets"] = list(dict.fromkeys(sets))
    if repos:
        optional |= {"base_model": list(dict.fromkeys(repos)), "base_model_relation": "merge" if model else "adapter"}
    return ModelCardData(
        library_name="transformers" if model else "hf-locstitch",
        tags=[
            "merge" if model else "localized-checkpoint",
            "hf-locstitch",
            *(["localize-and-stitch"] if plan.recipe.method.name == "locstitch" else []),
        ],
        **{key: value for key, value in optional.items() if value is not None},
    )


def _repo(plan: Plan, name: str) -> str | None:
    """org/name of an input; for a local localized checkpoint, that of the finetune it was made from."""
    repo = plan.inputs[name].source.repo
    localized = plan.localized_inputs.get(name) if isinstance(plan, StitchPlan) else None
    if repo is None and localized is not None and localized.finetuned.commit is not None:
        return localized.finetuned.ref.partition("@")[0]
    return repo


def licence(plan: Plan) -> str | None:
    """The parents' common licence; "other" where they differ, None where none is stated."""
    licences = {str(checkpoint.card.get("license")) for checkpoint in plan.inputs.values()} - {"None"}
    return licences.pop() if len(licences) == 1 else "other" if licences else None


def licence_of(card: Mapping[str, Any]) -> str:
    """For people: the Hub's identifier, with the licence's own name where the card gives one."""
    licence, name = card.get("license"), card.get("license_name")
    return f"{licence} ({name})" if licence and name else str(licence or "not stated")


def licence_note(plan: Plan) -> str:
    """What the parents' licences mean for the merge; empty if they are the same and allow commercial use."""
    licences = {name: licence_of(checkpoint.card) for name, checkpoint in plan.inputs.items()}
    notes = (
        ["The parents' licences differ, and a merge is bound by all of them."]
        if len(set(licences.values())) > 1
        else []
    )
    if closed := [f"{name} ({licence})" for name, licence in licences.items() if NON_COMMERCIAL.search(licence)]:
        notes.append(f"Not for commercial use, because of {', '.join(closed)}.")
    return " ".join(notes)


def settings(plan: Plan, record: Manifest) -> dict[str, str]:
    """Every setting of the merge; text of Markdown is marked as such."""
    recipe, model = plan.recipe, isinstance(plan, ModelPlan)
    localizers = dict.fromkeys(localizer.describe() for localizer in plan.localizers.values())
    of_model: dict[str, str] = {}
    if isinstance(plan, ModelPlan):
        of_model["other tensors"] = _rest(plan)
        of_model["config and tokenizer"] = "the base's" if plan.files is plan.base else f"{plan.files.label}'s"
        of_model |= {"vocabulary": plan.vocabulary.describe()} if plan.vocabulary else {}
        of_model |= {"edited, or of another model": ", ".join(plan.side_files.made)} if plan.side_files.made else {}
    rows = {
        **({"method": Markup(f"{code(recipe.method.name)} ({markdown(recipe.method.describe())})")} if model else {}),
        **({"localizer": "; ".join(localizers)} if localizers else {}),
        **({"stitch": recipe.stitch.describe()} if recipe.stitch else {}),
        **({"scale": f"{record.scale:g}"} if model else {}),
        **({"weights": per_tensor.describe(plan.weights)} if plan.weights else {}),
        "merged tensors" if model else "localized tensors": f"{len(plan.mask_tensors)}, {record.N:,} elements",
        **({"include": _globs(recipe.include)} if recipe.include else {}),
        **({"exclude": _globs(recipe.exclude)} if recipe.exclude else {}),
        **of_model,
        **({"dequantized": _dequantized(plan)} if plan.dequantized else {}),
        "dtype": ", ".join(sorted({tensor.dtype for shard in plan.shards for tensor in shard.tensors})),
        "made with": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    return {"hf-locstitch": record.hf_locstitch, **rows}


def _dequantized(plan: Plan) -> str:
    """Which inputs were, and from what; the config of one of them is without its quantization, too."""
    return ", ".join(f"{name} from {stored}" for name, stored in plan.dequantized.items())


def _globs(globs: Sequence[str]) -> Markup:
    return Markup(", ".join(map(code, globs)))


def pipeline_tag(checkpoint: Checkpoint) -> str | None:
    if tag := checkpoint.card.get("pipeline_tag"):
        return str(tag)
    return "text-generation" if architecture(checkpoint.config).endswith("ForCausalLM") else None


def write_card(plan: Plan, record: Manifest, path: Path, figures: Sequence[str] = ()) -> None:
    """README.md of a merge or a localized checkpoint, whose other files are beside it. figures: files in figures/."""
    method, fitting = plan.recipe.method, plan.recipe.fitting
    fitted = fitting.card(record.stitch, _inputs_table(plan, record.stitch)) if fitting and record.stitch else ""
    target = plan.recipe.target
    recipe = (path.parent / RECIPE_FILE).read_text(encoding="utf-8")
    text = template(TEMPLATE).render(
        card_data=Markup(card_data(plan).to_yaml()),
        title=title(plan),
        named=_named(plan),
        picture=picture(path.parent / FOLDER / TOP, ALT) if TOP in figures else "",
        ref=target.ref if target else HERE,
        repo=target.repo if target else HERE,
        branch=_branch(plan),
        pushed=target is not None,
        usage=_example(plan, usage_in(path.parent, plan.files.config)) if isinstance(plan, ModelPlan) else "",
        intro=method.introduce(
            len(plan.finetuned), fitting.how_found(record.stitch) if fitting and record.stitch else None, plan.joint
        ),
        fitted=fitted,
        localized=isinstance(plan, LocalizePlan),
        plan=plan,
        record=told(record),
        masks={JOINT: next(iter(told(record).masks.values()))} if plan.joint else told(record).masks,
        figures=figures,
        links={name: _link(plan, name) for name in plan.inputs},
        licences={name: licence_of(checkpoint.card) for name, checkpoint in plan.inputs.items()},
        licence_note=licence_note(plan),
        settings=settings(plan, record),
        data_links={name: data_link(found) for name, found in plan.data.items()},
        pins=pins(plan),
        recipe=fenced(recipe, "yaml"),
        first=next(iter(told(record).masks), ""),
        rest=_rest(plan) if isinstance(plan, ModelPlan) else "",
    )
    write_text(path, text)


def title(plan: Plan) -> str:
    """The name of the repo; without one, what is merged: the same in whatever folder it is made again."""
    if plan.recipe.target is not None:
        return plan.recipe.target.repo.rpartition("/")[2]
    return " + ".join(plan.finetuned) + (", localized" if isinstance(plan, LocalizePlan) else "")


def _named(plan: Plan) -> Markup:
    """One sentence: what it was made from."""
    *others, last = [_short_link(plan.inputs[name].source) for name in plan.finetuned]
    finetuned = Markup(" and ").join([Markup(", ").join(others), last]) if others else last
    return Markup(f"Made from {finetuned}, over the base {_short_link(plan.base.source)}.")


def _branch(plan: Plan) -> str | None:
    target = plan.recipe.target
    return target.branch if target and target.branch != MAIN else None


def _example(plan: Plan, usage: Usage) -> Markup:
    """How the model is used: code for transformers and, of a causal language model, commands of what serves it."""
    target = plan.recipe.target
    text = template(USAGE).render(
        usage=usage,
        repo=target.repo if target else HERE,
        folder=target.repo.rpartition("/")[2] if target else HERE,
        branch=_branch(plan),
        pushed=target is not None,
    )
    return Markup(text.rstrip())


def pins(plan: Plan) -> str:
    """What locstitch.yaml pins inputs to: weights and data, from the Hub and local ones."""
    commits = [checkpoint.source.commit for checkpoint in plan.inputs.values()]
    commits += [found.commit for found in (*plan.data.values(), *plan.fit_data.values())]
    if all(commits):
        return "to its commit"
    return "from the Hub to its commit, every local one to its hash" if any(commits) else "to the hash of its content"


def data_link(data: OpenSet) -> Markup:
    if data.repo is None:
        return Markup(f"local file {code(data.pinned.ref)}")
    at = link(data.repo, f"{constants.ENDPOINT}/datasets/{data.repo}/tree/{data.commit}")
    return Markup(f"{at} ({markdown(data.config)})") if data.config else at


def _link(plan: Plan, name: str) -> Markup:
    source = plan.inputs[name].source
    through = ""
    if name in plan.merges:
        through = f", its mask from {code(plan.merges[name].pinned)}"
    elif isinstance(plan, StitchPlan) and name != "base":
        through = f", localized from {code(plan.origins[name])}"
    return source_link(source) + Markup(through)


def source_link(source: Source) -> Markup:
    """Where a checkpoint is, without the path of a local folder."""
    if source.repo is None:
        return Markup(f"local folder {code(source.pinned)}")
    return Markup(f"{_short_link(source)} at {code((source.commit or '')[:7])}")


def _short_link(source: Source) -> Markup:
    """The same without the commit, to which the link leads."""
    if source.repo is None:
        return code(source.pinned)
    named = source.pinned.rpartition("@")[0]  # with a subfolder, if it is one
    return link(named, f"{constants.ENDPOINT}/{source.repo}/tree/{source.commit}{named.removeprefix(source.repo)}")


def _rest(plan: ModelPlan) -> str:
    """Where the tensors that are not merged come from."""
    return "the base's" if plan.unmasked_from is plan.base else f"{plan.recipe.rest_from}'s"


def _inputs_table(plan: Plan, stitch: Mapping[str, Any]) -> str:
    """The inputs that values were fitted to, as a Markdown table."""
    rows = ["| finetune | inputs | what they are | fitted to | held out |", "| :--- | :--- | :--- | ---: | ---: |"]
    for name, data in plan.fit_data.items():
        asked, counts = data.asked, stitch.get("counts", {}).get(name, {})
        source = f"{data_link(data)}, split {markdown(asked.split)}, seed {asked.seed}"
        fitted, held_out = counts.get("fitted", "–"), counts.get("held_out", "–")
        rows.append(f"| {markdown(name)} | {source} | {markdown(asked.role or 'not stated')} | {fitted} | {held_out} |")
    return "\n".join(rows)

"""From localized checkpoints, and finetunes whose masks a merge holds, to the plan of their stitch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations

from pydantic import ValidationError

from hf_locstitch.artifacts.fit import localized_mismatches, unlike
from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint, open_localized
from hf_locstitch.artifacts.manifest import weights_sha256
from hf_locstitch.artifacts.merged_finetune import MergedFinetune, open_merged_finetune
from hf_locstitch.artifacts.summing_order import Content, order_of_checkpoints, summing_order
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.compatibility import dtype_warnings, licence_warning, mismatches
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.errors import CheckpointError, MismatchError, RecipeError
from hf_locstitch.localize.localizer import Localizer
from hf_locstitch.localize.localizers import LOCALIZERS
from hf_locstitch.plan.layout import output_shards
from hf_locstitch.plan.lineage import same_warnings
from hf_locstitch.plan.plans import StitchPlan
from hf_locstitch.plan.recipe import Localized, Recipe
from hf_locstitch.plan.token_models import Said
from hf_locstitch.plan.vocabulary import VocabularyPlan, plan_vocabulary
from hf_locstitch.runtime.human import some
from hf_locstitch.runtime.settings import DEFAULT, Settings

AnyLocalized = LocalizedCheckpoint | MergedFinetune


def open_masked(entry: Localized) -> AnyLocalized:
    """The localized checkpoint of an entry, or the finetune with its mask. Raises RequestError."""
    if entry.mask is None:
        return open_localized(parse_ref(entry.ref))
    name = entry.mask.name or entry.name
    if name is None:
        raise RecipeError(f"{entry.ref} has a mask in {entry.mask.ref}, but no name to find it by. Give its name.")
    found = open_merged_finetune(parse_ref(entry.mask.ref), name, open_checkpoint(parse_ref(entry.ref)))
    if entry.mask.sha256 not in (None, found.mask_sha256):
        raise CheckpointError(
            f"the mask {name} of {found.source.label} has sha256 {found.mask_sha256}, but the recipe expects "
            f"{entry.mask.sha256}: that merge was made anew. Use the right one, or drop sha256 from the recipe."
        )
    return found


def stitch_vocabulary(
    recipe: Recipe, base: Checkpoint, localized: Mapping[str, AnyLocalized]
) -> tuple[VocabularyPlan | None, Said]:
    """The tokens of the output, those of the whole models among what is stitched, and what to say. Raises
    RequestError."""
    whole = {name: one.checkpoint for name, one in localized.items() if isinstance(one, MergedFinetune)}
    if not whole:
        return None, Said()
    chosen = list(next(iter(localized.values())).shapes)
    found, said = plan_vocabulary(recipe, base, whole, chosen, order_of_checkpoints(whole))
    if found is not None and found.localized:
        raise RecipeError(
            f"the masks range over {found.matrices[0]}, whose rows are matched by the finetunes' tokens: they are "
            "other rows with other finetunes. Merge the finetunes anew."
        )
    return found, said


def stitch_plan(
    recipe: Recipe,
    base: Checkpoint,
    localized: Mapping[str, AnyLocalized],
    settings: Settings = DEFAULT,
    vocabulary: VocabularyPlan | None = None,
) -> StitchPlan:
    """Plan the merge of localized checkpoints, and of finetunes whose masks a merge holds. vocabulary: of the latter.

    Raises MismatchError with every problem in the headers.
    """
    stored = {name: one for name, one in localized.items() if isinstance(one, LocalizedCheckpoint)}
    merged = {name: one for name, one in localized.items() if isinstance(one, MergedFinetune)}
    problems = [problem for checkpoint in localized.values() for problem in localized_mismatches(base, checkpoint)]
    problems += unlike(list(localized.values()))
    for one in merged.values():
        problems += mismatches(base, one.checkpoint, [name for name in one.shapes if name in base.tensors], ())
    if problems:
        raise MismatchError(problems)
    shapes = next(iter(localized.values())).shapes
    chosen = [name for name in base.tensors if name in shapes]
    warnings = [
        f"the values of {name} are not the finetuned model's own: they were solved for again under its mask alone "
        "(a refit). Where masks overlap, their mean is taken."
        for name, checkpoint in stored.items()
        if checkpoint.refitted and len(localized) > 1
    ]
    warnings += [
        warning
        for name, dtype_of in _dtypes(localized).items()
        for warning in dtype_warnings(name, [(dtype_of(tensor), base.info(tensor).dtype) for tensor in chosen])
    ]
    if vocabulary is not None and stored:
        warnings.append(
            f"{some(list(stored))}: a localized checkpoint has the base's tokens alone. If its finetune added tokens, "
            "they are not in the merge."
        )
    warnings += same_warnings(
        {
            (one, other)
            for one, other in combinations(localized, 2)
            if localized[one].finetuned.files == localized[other].finetuned.files
        }
    )
    files = {
        name: one.checkpoint if isinstance(one, MergedFinetune) else one.as_checkpoint()
        for name, one in localized.items()
    }
    origins = {name: one.finetuned.ref for name, one in stored.items()}
    origins |= {name: one.checkpoint.source.pinned for name, one in merged.items()}

    def content(name: str) -> Content:
        through = stored[name].content if name in stored else ""
        return (weights_sha256(localized[name].finetuned.files), through)

    layout = vocabulary.alignment.layout() if vocabulary is not None else base
    ones = [checkpoint.ones for checkpoint in localized.values()]
    return StitchPlan(
        recipe=recipe,
        settings=settings,
        inputs={"base": base, **files},
        shards=output_shards(recipe, layout, layout, frozenset(chosen)),
        mask_tensors=tuple(base.info(name) for name in chosen),
        n=sum(base.info(name).numel for name in chosen),
        k=max(ones),
        exact_k=len(set(ones)) == 1,
        localizers={name: _recorded_localizer(checkpoint) for name, checkpoint in localized.items()},
        origins=origins,
        order=summing_order(origins, content),
        scanned={name: [(tensor, 0, base.info(tensor).numel) for tensor in chosen] for name in merged},
        warnings=(*warnings, *licence_warning({"the base": base, **files})),
        unmasked_from=base,
        files=base,
        vocabulary=vocabulary,
        notes=vocabulary.notes if vocabulary is not None else (),
        localized_inputs=stored,
        merged_inputs=merged,
    )


def _dtypes(localized: Mapping[str, AnyLocalized]) -> dict[str, Callable[[str], str]]:
    """Of each, the dtype of a tensor's values."""
    infos = {
        name: one.checkpoint.info if isinstance(one, MergedFinetune) else one.stored for name, one in localized.items()
    }
    return {name: lambda tensor, info=info: info(tensor).dtype for name, info in infos.items()}


def _recorded_localizer(checkpoint: AnyLocalized) -> Localizer:
    """How its mask was found. Raises CheckpointError if that localizer is not installed."""
    try:
        return LOCALIZERS.find(str(checkpoint.localizer.get("method"))).model_validate(checkpoint.localizer)
    except (KeyError, ValidationError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"the localized checkpoint {checkpoint.label} was made by a localizer that is not installed, or is "
            f"damaged: {' '.join(reason.split())}. Install the package that provides it, or fetch the checkpoint again."
        ) from error

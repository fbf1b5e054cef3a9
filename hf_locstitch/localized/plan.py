"""Plans that make localized checkpoints, and plans that stitch them: pure data from headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import ITEM_BYTES, TensorInfo
from hf_locstitch.errors import MismatchError, RecipeError
from hf_locstitch.finetunes import dtype_warnings, licence_warning, more
from hf_locstitch.localized.checkpoint import VALUES_FORMAT, LocalizedCheckpoint
from hf_locstitch.output import OutputShard, PlannedTensor, output_shards
from hf_locstitch.plan import MergePlan
from hf_locstitch.recipe import Recipe
from hf_locstitch.settings import Settings

# Fields of a recipe that say something about a merged model.
OF_MODELS = ("scale", "rest_from", "files_from", "dtype", "shard_size", "evaluate")


def check_localizable(recipe: Recipe) -> None:
    """Raises RecipeError if a recipe asks for more than one finetune's mask and values."""
    if recipe.localized or len(recipe.finetuned) != 1:
        given = "localized checkpoints" if recipe.localized else f"{len(recipe.finetuned)} finetunes"
        raise RecipeError(
            f"a localized checkpoint is made of one finetune, not of {given}. Localize one after another."
        )
    if recipe.method != "locstitch":
        raise RecipeError(f"masks are found for method locstitch, not for {recipe.method}. Leave --method out.")
    if recipe.stitch is not None:
        raise RecipeError("a refit fits the values of all finetunes together: it goes with merge. Leave stitch out.")
    if given := [field for field in OF_MODELS if getattr(recipe, field) != Recipe.model_fields[field].default]:
        raise RecipeError(f"{', '.join(given)} cannot be said of a localized checkpoint. Say it when it is stitched.")


def localize_plan(plan: MergePlan) -> MergePlan:
    """The plan of a merge of one finetune, for its localized checkpoint alone."""
    ((name, checkpoint),) = plan.finetuned.items()
    share = plan.k / plan.n if plan.n else 0.0
    tensors = tuple(_guessed(checkpoint.info(info.name), share) for info in plan.localized)
    metadata = {
        "format": VALUES_FORMAT,
        "name": name,
        "base": plan.base.source.pinned,
        "finetuned": checkpoint.source.pinned,
    }
    shard = OutputShard(f"values/{name}.safetensors", tensors, metadata)
    return replace(plan, shards=(shard,), target="localized")


def _guessed(info: TensorInfo, share: float) -> PlannedTensor:
    """How many values of a tensor a mask keeps shows only when it is found."""
    ones = round(share * info.numel)
    return PlannedTensor(info.name, info.dtype, (ones,), ones * ITEM_BYTES[info.dtype], localized=True)


def stitch_plan(
    recipe: Recipe, base: Checkpoint, given: Mapping[str, LocalizedCheckpoint], settings: Settings
) -> MergePlan:
    """Plan the merge of localized checkpoints. Raises MismatchError with all that the headers show to be wrong."""
    problems = [problem for one in given.values() for problem in _mismatches(base, one)]
    problems += unlike(list(given.values()))
    if problems:
        raise MismatchError(problems)
    shapes = next(iter(given.values())).shapes
    chosen = [name for name in base.tensors if name in shapes]
    warnings = [
        warning
        for name, one in given.items()
        for warning in dtype_warnings(name, [(one.stored(tensor).dtype, base.info(tensor).dtype) for tensor in chosen])
    ]
    finetuned = {name: one.as_checkpoint() for name, one in given.items()}
    warnings += licence_warning({"the base": base, **finetuned})
    return MergePlan(
        recipe,
        settings,
        base,
        finetuned,
        rest=base,
        files=base,
        shards=output_shards(recipe, base, base, frozenset(chosen)),
        n=sum(base.info(name).numel for name in chosen),
        k=max(one.ones for one in given.values()),
        warnings=tuple(warnings),
        given=given,
    )


def _mismatches(base: Checkpoint, one: LocalizedCheckpoint) -> Iterator[str]:
    """What makes the base another than the one that was localized against, as far as headers tell."""
    if missing := [name for name in one.shapes if name not in base.tensors]:
        yield f"{one.label} has {missing[0]}, which the base {base.label} lacks{more(len(missing))}"
    shared = [(base.info(name), shape) for name, shape in one.shapes.items() if name in base.tensors]
    if wrong := [(info, shape) for info, shape in shared if info.shape != shape or not info.floating]:
        info, shape = wrong[0]
        yield (
            f"{info.name} is {list(shape)} in {one.label} but {info.dtype} {list(info.shape)} in the base "
            f"{base.label}{more(len(wrong))}"
        )
    if base.source.pinned == one.base.ref and one.base.commit is not None:
        return
    known = {shard.file: base.source.files[shard.file].sha256 for shard in base.shards}
    due = one.base.files
    unlike = sorted(known.keys() ^ due.keys()) or [file for file in due if known[file] not in (None, due[file])]
    if unlike:  # what a folder's hashes are shows only when it is read
        yield (
            f"{one.label} was localized against {one.base.ref}, where {unlike[0]} is "
            f"{_hash(due.get(unlike[0], 'absent'))}; in the base {base.label} it is "
            f"{_hash(known.get(unlike[0], 'absent'))}. Name the base that it was localized against"
        )


def _hash(value: str | None) -> str:
    return "there" if value is None else value if value == "absent" else f"sha256 {value[:12]}…"


def unlike(given: Sequence[LocalizedCheckpoint]) -> Iterator[str]:
    """What makes localized checkpoints unfit for one another."""
    first = given[0]
    for one in given[1:]:
        if one.base.files != first.base.files:
            yield f"{first.label} was localized against the base {first.base.ref}, {one.label} against {one.base.ref}"
        if apart := sorted(one.shapes.keys() ^ first.shapes.keys()):
            has, lacks = (one, first) if apart[0] in one.shapes else (first, one)
            yield (
                f"the mask of {has.label} ranges over {apart[0]}, that of {lacks.label} does not{more(len(apart))}: "
                "localize them with the same --include and --exclude"
            )

"""From a recipe to a plan: pin every revision, read every header, and report every problem at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from difflib import get_close_matches
from itertools import chain
from types import MappingProxyType
from typing import TypeVar

from pydantic import ValidationError

from hf_locstitch.adapters.opening import laid_over
from hf_locstitch.artifacts.fit import localized_mismatches, unlike
from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint, open_localized
from hf_locstitch.artifacts.values_file import values_metadata
from hf_locstitch.checkpoints.checkpoint import INDEX, Checkpoint
from hf_locstitch.checkpoints.compatibility import (
    differences,
    dtype_warnings,
    licence_warning,
    misfit_files,
    mismatches,
    swap_warnings,
)
from hf_locstitch.checkpoints.config_differences import config_differences, text_differences
from hf_locstitch.checkpoints.localizable import localizable, unknown_globs
from hf_locstitch.checkpoints.names import is_own, make_name, same_place
from hf_locstitch.checkpoints.opening import open_checkpoint, refuse_adapter
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.checkpoints.side_files import check_side_files, choose_side_files
from hf_locstitch.errors import CheckpointError, MismatchError, RecipeError
from hf_locstitch.localize.localizer import Localizer
from hf_locstitch.localize.localizers import LOCALIZERS
from hf_locstitch.plan.adapter_inputs import adapter_warnings, check_adapters
from hf_locstitch.plan.layout import OutputShard, guessed, output_shards
from hf_locstitch.plan.plans import LocalizePlan, MergePlan, ModelPlan, StitchPlan
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.runtime.human import some
from hf_locstitch.runtime.progress import hide_library_bars
from hf_locstitch.runtime.settings import DEFAULT, Settings
from hf_locstitch.tasks.benchmarks import chosen_tasks
from hf_locstitch.tasks.custom_code import refuse_custom_code
from hf_locstitch.tasks.leaks import JudgedTask, leaks
from hf_locstitch.tasks.sets import LocalizationSet, OpenSet, open_set

AnyPlan = TypeVar("AnyPlan", MergePlan, LocalizePlan)
ALL = ("*",)
# Fields of a recipe that apply to a merged model only.
OF_MODELS = ("scale", "rest_from", "files_from", "also_copy", "dtype", "shard_size", "evaluate")
AnyModelPlan = TypeVar("AnyModelPlan", bound=ModelPlan)
TOKENIZER = "tokenizer_config.json"  # where it is, other files of texts may be
NO_SETS: Mapping[str, OpenSet] = MappingProxyType({})


def make_plan(recipe: Recipe, settings: Settings = DEFAULT) -> MergePlan | StitchPlan:
    """The plan of a recipe that ends in a model. Raises RequestError with every problem."""
    if recipe.localized:
        return _open_and_stitch(recipe, settings)
    base, finetuned, data, fit_data = _open_inputs(recipe, settings)
    plan = _with_side_files(_with_text_warnings(merge_plan(recipe, base, finetuned, settings, data, fit_data)))
    if recipe.fitting is not None:
        recipe.fitting.check(finetuned, fit_data)
    return plan


def make_localize_plan(recipe: Recipe, settings: Settings = DEFAULT) -> LocalizePlan:
    """The plan for a localized checkpoint of the recipe's one finetune. Raises like make_plan."""
    _check_localizable(recipe)
    base, finetuned, data, _ = _open_inputs(recipe, settings)
    return _with_text_warnings(localize_plan(recipe, base, finetuned, settings, data))


def _open_inputs(
    recipe: Recipe, settings: Settings
) -> tuple[Checkpoint, dict[str, Checkpoint], dict[str, OpenSet], dict[str, OpenSet]]:
    """The base, the finetunes, the localization sets and the inputs to fit to, by name."""
    refs = [parse_ref(entry.ref) for entry in (recipe.base, *recipe.finetuned)]
    names = finetuned_names(recipe, [ref.name for ref in refs[1:]])
    with hide_library_bars(), ThreadPoolExecutor(min(8, len(refs))) as pool:
        base, *opened = pool.map(open_checkpoint, refs)
    refuse_adapter(base, "a base must be a whole model")
    finetuned = dict(zip(names, opened, strict=True))
    check_adapters(recipe, settings, finetuned)
    needs_data = recipe.localizer is not None and recipe.localizer.needs_data
    data = {name: open_set(asked) for name, asked in _by_name(recipe.data if needs_data else (), names).items()}
    fit_data = {name: open_set(asked) for name, asked in _by_name(recipe.fit_sets, names).items()}
    return base, laid_over(base, finetuned), data, fit_data


def _with_text_warnings(plan: AnyPlan) -> AnyPlan:
    """The plan, with what small files of the inputs say of texts, such as other chat templates."""
    kept = _kept_name(plan.recipe, plan.finetuned)
    others = {name: one for name, one in plan.finetuned.items() if one.layout is one or TOKENIZER in one.source.files}
    with hide_library_bars():
        found = [text_differences(plan.base.source, name, one.source, kept) for name, one in others.items()]
    return replace(plan, warnings=(*plan.warnings, *chain.from_iterable(found)))


def _kept_name(recipe: Recipe, finetuned: Mapping[str, Checkpoint]) -> str:
    """Whose config and tokenizer the output gets."""
    name = recipe.files_from or recipe.rest_from or "the base"
    return name if name not in finetuned or finetuned[name].layout is finetuned[name] else "the base"


def _open_and_stitch(recipe: Recipe, settings: Settings) -> StitchPlan:
    refs = [parse_ref(entry.ref) for entry in recipe.localized]
    with hide_library_bars(), ThreadPoolExecutor(min(8, len(refs) + 1)) as pool:
        base = pool.submit(open_checkpoint, parse_ref(recipe.base.ref))
        localized = list(pool.map(open_localized, refs))
        names = finetuned_names(recipe, [checkpoint.name for checkpoint in localized])
        named = dict(zip(names, localized, strict=True))
        return _with_side_files(stitch_plan(recipe, base.result(), named, settings))


def _with_side_files(plan: AnyModelPlan) -> AnyModelPlan:
    """The plan with the files that go along with the weights. Raises MismatchError, CheckpointError."""
    source, globs = plan.files.source, plan.recipe.also_copy
    free = [file for file in source.files if not is_own(file)]
    if problems := unknown_globs(free, globs, f"{source.label} (--also-copy)", "file"):
        raise MismatchError(problems)
    chosen = choose_side_files(plan.files, globs)
    check_side_files(source, chosen)
    if twice := same_place([INDEX, *(shard.file for shard in plan.shards), *chosen.copied]):
        raise RecipeError(f"also_copy asks for {twice[1]}, but the merge writes {twice[0]} itself. Name other files.")
    warnings = list(plan.warnings)
    if chosen.left_weights:
        warnings.append(
            f"{some(chosen.left_weights)} of {_kept_name(plan.recipe, plan.finetuned)}: weights that nothing says the "
            "model loads are neither merged nor copied (--also-copy copies them)."
        )
    return replace(plan, side_files=chosen, warnings=tuple(warnings))


def finetuned_names(recipe: Recipe, defaults: Sequence[str]) -> list[str]:
    """The finetunes' names, made safe where they are defaults. Raises RecipeError if two name the same file."""
    names = [
        entry.name or make_name(default, f"finetune-{number}")
        for number, (entry, default) in enumerate(zip(recipe.entries, defaults, strict=True), start=1)
    ]
    if twice := same_place(names):
        called = repr(twice[0]) if twice[0] == twice[1] else " and ".join(map(repr, twice))
        raise RecipeError(
            f"two finetunes are named {called} ({', '.join(names)}), but each name is a mask's file name. Set --names."
        )
    if "base" in (name.casefold() for name in names):
        raise RecipeError("a finetune is named 'base', a name reserved for the base. Set --names.")
    return names


def _made_names(recipe: Recipe, names: Iterable[str]) -> Iterator[str]:
    """A sentence for each finetune that goes by another name than its own."""
    for entry, name in zip(recipe.finetuned, names, strict=False):
        if entry.name is None and (own := parse_ref(entry.ref).name) != name:
            yield f"the finetune {own!r} is called {name}: its own name cannot be a file's. --names sets another."


def _by_name(
    sets: Mapping[str, LocalizationSet] | Sequence[LocalizationSet], names: Sequence[str]
) -> dict[str, LocalizationSet]:
    """The set of each finetune. Raises RecipeError if the recipe names others."""
    if not isinstance(sets, Mapping):
        return dict(zip(names, sets, strict=False))
    if unknown := sorted(set(sets) - set(names)):
        raise RecipeError(f"data is given for {unknown[0]!r}, which is not one of the finetunes ({', '.join(names)}).")
    return {name: sets[name] for name in names if name in sets}


def merge_plan(
    recipe: Recipe,
    base: Checkpoint,
    finetuned: Mapping[str, Checkpoint],
    settings: Settings = DEFAULT,
    data: Mapping[str, OpenSet] = NO_SETS,
    fit_data: Mapping[str, OpenSet] = NO_SETS,
) -> MergePlan:
    """Plan the merge. Raises MismatchError with every problem in the headers."""
    chosen, warnings = _check_inputs(recipe, base, finetuned, settings, data, fit_data)
    files, unmasked_from = _given_files(recipe, base, finetuned)
    localizer, numels = recipe.localizer, [base.info(name).numel for name in chosen]
    n = sum(numels)
    return MergePlan(
        recipe=recipe,
        settings=settings,
        inputs={"base": base, **finetuned},
        shards=output_shards(recipe, base, unmasked_from.layout, frozenset(chosen)),
        mask_tensors=tuple(base.info(name) for name in chosen),
        n=n,
        k=localizer.kept(numels) if localizer else n,
        exact_k=localizer is None or localizer.density is not None,
        localizers={} if localizer is None else dict.fromkeys(finetuned, localizer),
        origins={name: checkpoint.source.pinned for name, checkpoint in finetuned.items()},
        order=tuple(sorted(finetuned, key=lambda name: finetuned[name].source.pinned)),
        scanned=_whole(base, chosen, finetuned) if localizer else {},
        warnings=warnings,
        unmasked_from=unmasked_from,
        files=files,
        groups=tuple(localizer.groups(numels)) if localizer else (),
        data=data,
        fit_data=fit_data,
    )


def localize_plan(
    recipe: Recipe,
    base: Checkpoint,
    finetuned: Mapping[str, Checkpoint],
    settings: Settings = DEFAULT,
    data: Mapping[str, OpenSet] = NO_SETS,
) -> LocalizePlan:
    """finetuned: exactly one. Raises like merge_plan."""
    chosen, warnings = _check_inputs(recipe, base, finetuned, settings, data, NO_SETS)
    ((name, checkpoint),) = finetuned.items()
    localizer, numels = recipe.localizer, [base.info(tensor).numel for tensor in chosen]
    assert localizer is not None
    n, k = sum(numels), localizer.kept(numels)
    tensors = tuple(guessed(checkpoint.info(tensor), k / n if n else 0.0) for tensor in chosen)
    metadata = values_metadata(name, base.source.pinned, checkpoint.source.pinned)
    return LocalizePlan(
        recipe=recipe,
        settings=settings,
        inputs={"base": base, **finetuned},
        shards=(OutputShard(f"values/{name}.safetensors", tensors, metadata),),
        mask_tensors=tuple(base.info(tensor) for tensor in chosen),
        n=n,
        k=k,
        exact_k=localizer.density is not None,
        localizers={name: localizer},
        origins={name: checkpoint.source.pinned},
        order=(name,),
        scanned=_whole(base, chosen, finetuned),
        warnings=warnings,
        groups=tuple(localizer.groups(numels)),
        data=data,
    )


def stitch_plan(
    recipe: Recipe, base: Checkpoint, localized: Mapping[str, LocalizedCheckpoint], settings: Settings = DEFAULT
) -> StitchPlan:
    """Plan the merge of localized checkpoints. Raises MismatchError with every problem in the headers."""
    problems = [problem for checkpoint in localized.values() for problem in localized_mismatches(base, checkpoint)]
    problems += unlike(list(localized.values()))
    if problems:
        raise MismatchError(problems)
    shapes = next(iter(localized.values())).shapes
    chosen = [name for name in base.tensors if name in shapes]
    warnings = [
        warning
        for name, checkpoint in localized.items()
        for warning in dtype_warnings(
            name, [(checkpoint.stored(tensor).dtype, base.info(tensor).dtype) for tensor in chosen]
        )
    ]
    files = {name: checkpoint.as_checkpoint() for name, checkpoint in localized.items()}
    origins = {name: checkpoint.finetuned.ref for name, checkpoint in localized.items()}
    ones = [checkpoint.ones for checkpoint in localized.values()]
    return StitchPlan(
        recipe=recipe,
        settings=settings,
        inputs={"base": base, **files},
        shards=output_shards(recipe, base, base, frozenset(chosen)),
        mask_tensors=tuple(base.info(name) for name in chosen),
        n=sum(base.info(name).numel for name in chosen),
        k=max(ones),
        exact_k=len(set(ones)) == 1,
        localizers={name: _recorded_localizer(checkpoint) for name, checkpoint in localized.items()},
        origins=origins,
        order=tuple(sorted(localized, key=origins.__getitem__)),
        scanned={},
        warnings=(*warnings, *licence_warning({"the base": base, **files})),
        unmasked_from=base,
        files=base,
        localized_inputs=localized,
    )


def _recorded_localizer(checkpoint: LocalizedCheckpoint) -> Localizer:
    """How its mask was found. Raises CheckpointError if that localizer is not installed."""
    try:
        return LOCALIZERS.find(str(checkpoint.localizer.get("method"))).model_validate(checkpoint.localizer)
    except (KeyError, ValidationError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"the localized checkpoint {checkpoint.label} was made by a localizer that is not installed, or is "
            f"damaged: {' '.join(reason.split())}. Install the package that provides it, or fetch the checkpoint again."
        ) from error


def _whole(
    base: Checkpoint, chosen: Iterable[str], finetuned: Mapping[str, Checkpoint]
) -> dict[str, list[tuple[str, int, int]]]:
    """Every element of the chosen tensors, of every input."""
    pieces = [(name, 0, base.info(name).numel) for name in chosen]
    return dict.fromkeys(["base", *finetuned], pieces) if pieces else {}


def _check_inputs(
    recipe: Recipe,
    base: Checkpoint,
    finetuned: Mapping[str, Checkpoint],
    settings: Settings,
    data: Mapping[str, OpenSet],
    fit_data: Mapping[str, OpenSet],
) -> tuple[list[str], tuple[str, ...]]:
    """The tensors that the method ranges over, and warnings. Raises RecipeError, MismatchError."""
    if data and not settings.cache:
        raise RecipeError("a localizer that uses data loads whole models: it cannot be combined with --no-cache.")
    if fit_data and not settings.cache:
        assert recipe.fitting is not None
        raise RecipeError(
            f"{recipe.fitting.called} reads the finetunes repeatedly, a layer at a time: it cannot be combined with "
            "--no-cache. Drop one of the two."
        )
    if purpose := _loads_models(recipe, data, fit_data):
        for checkpoint in (base, *finetuned.values()):
            refuse_custom_code(checkpoint, purpose)
    everywhere = list(dict.fromkeys([*base.tensors, *(t for one in finetuned.values() for t in one.tensors)]))
    problems = unknown_globs(list(base.tensors), recipe.include, "the base")
    problems += unknown_globs(everywhere, recipe.exclude, "the base or a finetune")
    for asked in ("rest_from", "files_from"):
        problems += _unknown_name(asked, getattr(recipe, asked), list(finetuned))
    # Without globs: the transformer blocks, recognized by name, or all tensors, depending on the method.
    include = recipe.include or (() if recipe.method.blocks_only else ALL)
    chosen = localizable((info for _, info in base.tensors.values()), include, recipe.exclude)
    if not chosen:
        problems.append(
            f"no tensor of {base.label} is localizable (its names look like {', '.join(list(base.tensors)[:3])}); "
            "select tensors with --include"
        )
    warnings = list(_made_names(recipe, finetuned))
    for name, checkpoint in finetuned.items():
        candidates = localizable((info for _, info in checkpoint.tensors.values()), include, recipe.exclude)
        problems += mismatches(base, checkpoint, chosen, candidates)
        warnings += differences(base, name, checkpoint, chosen)
        warnings += config_differences(base, name, checkpoint, _kept_name(recipe, finetuned))
    found = misfit_files(*_given_files(recipe, base, finetuned))
    problems, warnings = problems + found[0], warnings + found[1]
    if problems:
        raise MismatchError(problems)
    warnings += adapter_warnings(base, finetuned)
    warnings += swap_warnings(base, finetuned)
    warnings += licence_warning({"the base": base, **finetuned})
    warnings += leaks(list(_judged(recipe)), recipe.used_data)
    warnings += recipe.fitting.warnings() if recipe.fitting else []
    wanted = set(chosen)
    return [name for name in base.tensors if name in wanted], tuple(warnings)


def _given_files(
    recipe: Recipe, base: Checkpoint, finetuned: Mapping[str, Checkpoint]
) -> tuple[Checkpoint, Checkpoint]:
    """Where config and tokenizer come from, and the tensors that are not merged; the base for an unknown name."""
    unmasked_from = finetuned.get(recipe.rest_from, base) if recipe.rest_from else base
    files = finetuned.get(recipe.files_from, base) if recipe.files_from else unmasked_from.layout
    return files, unmasked_from


def _loads_models(recipe: Recipe, data: Mapping[str, OpenSet], fit_data: Mapping[str, OpenSet]) -> str | None:
    """What has transformers load the models; None if nothing does."""
    if data:
        return "a localizer that uses data"
    if fit_data:
        assert recipe.fitting is not None
        return recipe.fitting.called
    return "an evaluation" if recipe.evaluate is not None else None


def _judged(recipe: Recipe) -> Iterator[JudgedTask]:
    """The tasks that the merge will be judged on; their data sets are known to lm-eval only."""
    if recipe.evaluate is not None:
        for spec in chosen_tasks(recipe.evaluate.tasks, recipe.evaluate.suite, recipe.evaluate.limit)[0]:
            yield JudgedTask(spec.name)


def _unknown_name(field: str, value: str | None, names: list[str]) -> list[str]:
    if value is None or value in names:
        return []
    near = get_close_matches(value, names, n=1, cutoff=0.0)
    return [f"{field} is {value!r}, which is not one of the finetunes ({', '.join(names)}); did you mean {near[0]!r}?"]


def _check_localizable(recipe: Recipe) -> None:
    """Raises RecipeError if a recipe asks for more than one finetune's mask and values."""
    if recipe.localized or len(recipe.finetuned) != 1:
        given = "localized checkpoints" if recipe.localized else f"{len(recipe.finetuned)} finetunes"
        raise RecipeError(
            f"a localized checkpoint is made from one finetune, not from {given}. Localize them one at a time."
        )
    if recipe.method.name != "locstitch":
        raise RecipeError(f"localize finds masks for method locstitch, not for {recipe.method.name}. Drop --method.")
    if recipe.stitch is not None:
        raise RecipeError("a refit fits the values of all finetunes together: it works in merge only. Drop stitch.")
    if given := [field for field in OF_MODELS if getattr(recipe, field) != Recipe.model_fields[field].default]:
        raise RecipeError(f"{', '.join(given)} cannot be set for a localized checkpoint. Set this when stitching.")

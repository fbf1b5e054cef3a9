"""From a recipe to a plan: pin every revision, read every header, and report every problem at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count
from types import MappingProxyType
from typing import Any, TypeVar

from hf_locstitch.adapters.opening import laid_over
from hf_locstitch.artifacts.merged_finetune import MergedFinetune
from hf_locstitch.artifacts.summing_order import order_of_checkpoints
from hf_locstitch.artifacts.values_file import values_metadata
from hf_locstitch.checkpoints.checkpoint import INDEX, Checkpoint
from hf_locstitch.checkpoints.config_differences import (
    KeptTexts,
    config_differences,
    text_differences,
    token_differences,
)
from hf_locstitch.checkpoints.localizable import unknown_globs
from hf_locstitch.checkpoints.names import is_own, make_name, same_place
from hf_locstitch.checkpoints.opening import open_checkpoint, refuse_adapter
from hf_locstitch.checkpoints.ref import Ref, parse_ref
from hf_locstitch.checkpoints.side_files import MAPPED, check_side_files, choose_side_files
from hf_locstitch.errors import MismatchError, RecipeError, StrictError
from hf_locstitch.plan.adapter_inputs import check_adapters
from hf_locstitch.plan.checking import (
    check_alignment,
    check_inputs,
    check_kept,
    check_localizable,
    check_weights,
    chosen_tensors,
    given_files,
    kept_name,
)
from hf_locstitch.plan.cost import check_memory
from hf_locstitch.plan.data_sets import open_sets
from hf_locstitch.plan.device import with_device
from hf_locstitch.plan.dropped_layers import without_dropped_layers
from hf_locstitch.plan.layout import OutputShard, guessed, index_name, output_shards
from hf_locstitch.plan.lineage import with_lineage
from hf_locstitch.plan.plans import LocalizePlan, MergePlan, ModelPlan, Plan, StitchPlan
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.plan.stitching import open_masked, stitch_plan, stitch_vocabulary
from hf_locstitch.plan.token_models import BASE, UNION, WORDS, Said
from hf_locstitch.plan.tokenizer_files import template_owner, with_tokens
from hf_locstitch.plan.untrained_state import without_untrained_state
from hf_locstitch.plan.vocabulary import VocabularyPlan, plan_vocabulary
from hf_locstitch.plan.whole_tensors import within_limit
from hf_locstitch.runtime.every import every
from hf_locstitch.runtime.human import some
from hf_locstitch.runtime.packages import need
from hf_locstitch.runtime.progress import hide_library_bars
from hf_locstitch.runtime.settings import DEFAULT, Settings
from hf_locstitch.tasks.sets import OpenSet

AnyPlan = TypeVar("AnyPlan", MergePlan, LocalizePlan)
AnyStrictPlan = TypeVar("AnyStrictPlan", bound=Plan)
AnyGiven = TypeVar("AnyGiven")
AnyModelPlan = TypeVar("AnyModelPlan", bound=ModelPlan)
TOKENIZER = "tokenizer_config.json"  # where it is, other files of texts may be
NO_SETS: Mapping[str, OpenSet] = MappingProxyType({})


def make_plan(
    recipe: Recipe, settings: Settings = DEFAULT, open_model: Callable[[Ref], Checkpoint] = open_checkpoint
) -> MergePlan | StitchPlan:
    """The plan of a recipe that ends in a model. Raises RequestError with every problem.

    open_model: reads the headers of base and finetunes, for plans that have these in common.
    """
    _check_packages(recipe)
    if recipe.localized:
        return _open_and_stitch(recipe, settings)
    recipe, idle = with_device(recipe, settings.device)
    base, finetuned, data, fit_data = _open_inputs(recipe, settings, open_model)
    recipe, notes = _without_what_stays(recipe, base, finetuned)
    vocabulary, said = plan_vocabulary(
        recipe, base, finetuned, chosen_tensors(recipe, base), order_of_checkpoints(finetuned)
    )
    planned = within_limit(merge_plan(recipe, base, finetuned, settings, data, fit_data, vocabulary))
    planned.files.source.expect(MAPPED)
    planned = with_lineage(_with_text_warnings(_with_said(_with_warnings(planned, notes), said)))
    plan = _with_tokens(_with_side_files(planned))
    if recipe.fitting is not None:
        recipe.fitting.check(finetuned, fit_data)
    return _strictly(_with_fit_warnings(replace(plan, notes=(*plan.notes, *idle))))


def make_localize_plan(recipe: Recipe, settings: Settings = DEFAULT) -> LocalizePlan:
    """The plan for a localized checkpoint of the recipe's one finetune. Raises like make_plan."""
    _check_packages(recipe)
    recipe, idle = with_device(_without_fit_data(recipe), settings.device)
    check_localizable(recipe)
    base, finetuned, data, _ = _open_inputs(recipe, settings)
    recipe, notes = _without_what_stays(recipe, base, finetuned)
    planned = _with_warnings(localize_plan(recipe, base, finetuned, settings, data), notes)
    planned = with_lineage(_with_text_warnings(planned))
    return _strictly(_with_fit_warnings(replace(planned, notes=(*planned.notes, *idle))))


def _check_packages(recipe: Recipe) -> None:
    """Raises RecipeError if a part of the recipe imports what is not installed."""
    need(f"the method {recipe.method.name}", *recipe.method.packages)
    if recipe.localizer is not None:
        need(f"the localizer {recipe.localizer.method}", *recipe.localizer.packages)
    if recipe.stitch is not None:
        need(f"stitch: {recipe.stitch.method}", *recipe.stitch.packages)


def _strictly(plan: AnyStrictPlan) -> AnyStrictPlan:
    """The plan, if it warns of nothing, or may. Raises StrictError."""
    if plan.recipe.strict and plan.warnings:
        raise StrictError(plan.warnings)
    return plan


def _without_what_stays(
    recipe: Recipe, base: Checkpoint, finetuned: Mapping[str, Checkpoint]
) -> tuple[Recipe, list[str]]:
    """The recipe, which leaves out tensors that stay the base's, and sentences that say so."""
    recipe, notes = without_dropped_layers(recipe, base, finetuned)
    recipe, more = without_untrained_state(recipe, base)
    return recipe, notes + more


def _with_warnings(plan: AnyStrictPlan, said: Sequence[str]) -> AnyStrictPlan:
    return replace(plan, warnings=(*plan.warnings, *said))


def _with_said(plan: AnyStrictPlan, said: Said) -> AnyStrictPlan:
    return replace(plan, warnings=(*plan.warnings, *said.warnings), notes=(*plan.notes, *said.notes))


def _with_fit_warnings(plan: AnyPlan) -> AnyPlan:
    """The plan, with what fitting values says of the models. Raises RequestError."""
    fitting = plan.recipe.fitting
    if fitting is None:
        return plan
    warnings = fitting.plan_warnings(plan)
    check_memory(plan)
    return _with_warnings(plan, warnings)


def _without_fit_data(recipe: Recipe) -> Recipe:
    """What a localizer is given to look at is not what the one finetune's values are fitted to."""
    if recipe.stitch is None or recipe.stitch.data != recipe.data:
        return recipe
    return recipe.model_copy(update={"stitch": recipe.stitch.model_copy(update={"data": ()})})


def _open_inputs(
    recipe: Recipe, settings: Settings, open_model: Callable[[Ref], Checkpoint] = open_checkpoint
) -> tuple[Checkpoint, dict[str, Checkpoint], dict[str, OpenSet], dict[str, OpenSet]]:
    """The base, the finetunes, the localization sets and the inputs to fit to, by name."""
    refs = every([partial(parse_ref, entry.ref) for entry in (recipe.base, *recipe.finetuned)])
    names = finetuned_names(recipe, [ref.name for ref in refs[1:]])
    with hide_library_bars():
        base, *opened = every([partial(open_model, ref) for ref in refs])
    refuse_adapter(base, "a base must be a whole model")
    finetuned = dict(zip(names, opened, strict=True))
    check_adapters(recipe, settings, finetuned)
    needs_data = recipe.localizer is not None and recipe.localizer.needs_data
    finetuned = laid_over(base, finetuned)
    data = open_sets(_by_name(recipe.data if needs_data else (), names), finetuned, base)
    fit_data = open_sets(_by_name(recipe.fit_sets, names), finetuned, base, unlabelled=True)
    return base, finetuned, data, fit_data


def _with_text_warnings(plan: AnyPlan) -> AnyPlan:
    """The plan, with what configs and small files of the inputs say of texts, such as other chat templates. Tokens of a
    finetune that the tokenizer which was asked for lacks are but noted."""
    kept = _kept_texts(plan)
    found = [config_differences(plan.base, name, one, kept) for name, one in plan.finetuned.items()]
    others = {name: one for name, one in plan.finetuned.items() if one.layout is one or TOKENIZER in one.source.files}
    with hide_library_bars():
        found += [text_differences(plan.base.source, name, one.source, kept) for name, one in others.items()]
        tokens = [token_differences(plan.base.source, name, one.source, kept) for name, one in others.items()]
    warned, of_tokens = (tuple(chain.from_iterable(lists)) for lists in (found, tokens))
    asked = plan.recipe.tokenizer not in (None, UNION)
    return _with_said(plan, Said(warned, of_tokens) if asked else Said((*warned, *of_tokens)))


def _kept_texts(plan: MergePlan | LocalizePlan) -> KeptTexts:
    recipe, one = plan.recipe, kept_name(plan.recipe, plan.finetuned)
    if not isinstance(plan, MergePlan):
        return KeptTexts(one, one, one, one)
    named = str(recipe.tokenizer) if recipe.tokenizer in plan.finetuned else one
    owner = template_owner(recipe, plan.files, plan.finetuned, plan.vocabulary)
    template = one if owner == BASE else owner
    tokens = None if plan.vocabulary is not None and plan.vocabulary.tokenizer == UNION else named
    return KeptTexts(one, named, None if recipe.chat_template else template, tokens, ends=template)


def _open_and_stitch(recipe: Recipe, settings: Settings) -> StitchPlan:
    calls: list[Callable[[], Any]] = [lambda: open_checkpoint(parse_ref(recipe.base.ref))]
    calls += [partial(open_masked, entry) for entry in recipe.localized]
    with hide_library_bars():
        base, *opened = every(calls)
    named = dict(zip(finetuned_names(recipe, [one.name for one in opened]), opened, strict=True))
    merged = {name: one for name, one in named.items() if isinstance(one, MergedFinetune)}
    whole = {name: one.checkpoint for name, one in merged.items()}
    if whole:
        refuse_adapter(base, "a base must be a whole model")
        check_adapters(recipe, settings, whole)
    named |= {name: merged[name].over(checkpoint) for name, checkpoint in laid_over(base, whole).items()}
    with hide_library_bars():
        vocabulary, said = stitch_vocabulary(recipe, base, named)
        planned = _with_said(stitch_plan(recipe, base, named, settings, vocabulary), said)
        return _strictly(_with_tokens(_with_side_files(planned)))


def _with_side_files(plan: AnyModelPlan) -> AnyModelPlan:
    """The plan with the files that go along with the weights. Raises MismatchError, CheckpointError."""
    source, globs = plan.files.source, plan.recipe.also_copy
    free = [file for file in source.files if not is_own(file)]
    if problems := unknown_globs(free, globs, f"{source.label} (--also-copy)", "file"):
        raise MismatchError(problems)
    chosen = choose_side_files(plan.files, globs)
    check_side_files(source, chosen)
    if twice := same_place([index_name(plan.shards) or INDEX, *(shard.file for shard in plan.shards), *chosen.copied]):
        raise RecipeError(f"also_copy asks for {twice[1]}, but the merge writes {twice[0]} itself. Name other files.")
    warnings = list(plan.warnings)
    if chosen.left_weights:
        warnings.append(
            f"{some(chosen.left_weights)} of {kept_name(plan.recipe, plan.finetuned)}: weights that nothing says the "
            "model loads are neither merged nor copied (--also-copy copies them)."
        )
    return replace(plan, side_files=chosen, warnings=tuple(warnings))


def _with_tokens(plan: AnyModelPlan) -> AnyModelPlan:
    """The plan with the files of the chosen tokenizer and chat template. Raises RequestError."""
    recipe, vocabulary, models = plan.recipe, plan.vocabulary, plan.whole_models
    if vocabulary is None and recipe.chat_template is None and recipe.tokenizer not in models:
        return plan
    with hide_library_bars():
        files, warnings, notes = with_tokens(recipe, plan.files, plan.side_files, models, vocabulary)
    return replace(plan, side_files=files, warnings=(*plan.warnings, *warnings), notes=(*plan.notes, *notes))


def finetuned_names(recipe: Recipe, defaults: Sequence[str]) -> list[str]:
    """The finetunes' names, made safe where they are defaults. Raises RecipeError if two name the same file."""
    names = [
        entry.name or make_name(default, f"finetune-{number}")
        for number, (entry, default) in enumerate(zip(recipe.entries, defaults, strict=True), start=1)
    ]
    if twice := same_place(names):
        called = repr(twice[0]) if twice[0] == twice[1] else " and ".join(map(repr, twice))
        raise RecipeError(
            f"two finetunes are named {called}, but each name is a mask's file name. Give each one of its own, such as "
            f"--names {' '.join(_made_different(names))} (in a recipe: a name beside each ref)."
        )
    if taken := [name for name in names if name.casefold() in WORDS]:
        raise RecipeError(
            f"a finetune is named {taken[0]!r}, which in recipes and flags stands for something else. Name all "
            f"finetunes: --names {' '.join('model' if name in taken else name for name in names)} "
            "(in a recipe: a name beside each ref)."
        )
    return names


def _made_different(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that stand for the same file as an earlier one."""
    made: list[str] = []
    for name in names:
        tried = (f"{name}-{number}" if number else name for number in chain([0], count(2)))
        made.append(next(one for one in tried if not same_place([*made, one])))
    return made


def _by_name(
    given: Mapping[str, AnyGiven] | Sequence[AnyGiven], names: Sequence[str], what: str = "data"
) -> dict[str, AnyGiven]:
    """What is given for each finetune. Raises RecipeError if the recipe names others."""
    if not isinstance(given, Mapping):
        return dict(zip(names, given, strict=False))
    if unknown := sorted(set(given) - set(names)):
        raise RecipeError(
            f"{what} is given for {unknown[0]!r}, which is not one of the finetunes ({', '.join(names)})."
        )
    return {name: given[name] for name in names if name in given}


def merge_plan(
    recipe: Recipe,
    base: Checkpoint,
    finetuned: Mapping[str, Checkpoint],
    settings: Settings = DEFAULT,
    data: Mapping[str, OpenSet] = NO_SETS,
    fit_data: Mapping[str, OpenSet] = NO_SETS,
    vocabulary: VocabularyPlan | None = None,
) -> MergePlan:
    """Plan the merge. Raises MismatchError with every problem in the headers."""
    seen, layout = (base, finetuned), None
    if vocabulary is not None:
        check_alignment(recipe, settings, vocabulary, bool(data or fit_data))
        alignment = vocabulary.alignment
        seen, layout = (alignment.seen("base"), {name: alignment.seen(name) for name in finetuned}), alignment.layout()
    chosen, warnings = check_inputs(recipe, *seen, settings, data, fit_data)
    weights = _by_name(recipe.weights, list(finetuned), "a weight")
    check_weights(recipe, weights, chosen)
    if vocabulary is not None and vocabulary.localized:
        base, finetuned = seen
    files, unmasked_from = given_files(recipe, base, finetuned)
    localizer, numels = recipe.localizer, [base.info(name).numel for name in chosen]
    n = sum(numels)
    k = localizer.kept(numels) if localizer else n
    check_kept(localizer, n, k)
    return MergePlan(
        recipe=recipe,
        settings=settings,
        inputs={"base": base, **finetuned},
        shards=output_shards(recipe, layout or base, layout or unmasked_from.layout, frozenset(chosen)),
        mask_tensors=tuple(base.info(name) for name in chosen),
        n=n,
        k=k,
        exact_k=localizer is None or localizer.density is not None,
        localizers={} if localizer is None else dict.fromkeys(finetuned, localizer),
        origins={name: checkpoint.source.pinned for name, checkpoint in finetuned.items()},
        order=tuple(finetuned) if recipe.method.ordered else order_of_checkpoints(finetuned),
        scanned=_whole(base, chosen, finetuned) if localizer else {},
        warnings=warnings,
        unmasked_from=unmasked_from,
        files=files,
        groups=tuple(localizer.groups(numels)) if localizer else (),
        data=data,
        fit_data=fit_data,
        vocabulary=vocabulary,
        notes=vocabulary.notes if vocabulary is not None else (),
        weights=weights,
    )


def localize_plan(
    recipe: Recipe,
    base: Checkpoint,
    finetuned: Mapping[str, Checkpoint],
    settings: Settings = DEFAULT,
    data: Mapping[str, OpenSet] = NO_SETS,
) -> LocalizePlan:
    """finetuned: exactly one. Raises like merge_plan."""
    chosen, warnings = check_inputs(recipe, base, finetuned, settings, data, NO_SETS)
    ((name, checkpoint),) = finetuned.items()
    localizer, numels = recipe.localizer, [base.info(tensor).numel for tensor in chosen]
    assert localizer is not None
    n, k = sum(numels), localizer.kept(numels)
    check_kept(localizer, n, k)
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


def _whole(
    base: Checkpoint, chosen: Iterable[str], finetuned: Mapping[str, Checkpoint]
) -> dict[str, list[tuple[str, int, int]]]:
    """Every element of the chosen tensors, of every input."""
    pieces = [(name, 0, base.info(name).numel) for name in chosen]
    return dict.fromkeys(["base", *finetuned], pieces) if pieces else {}

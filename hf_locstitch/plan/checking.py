"""What is checked of a recipe and its inputs before there is a plan: every problem at once, and what to warn of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.compatibility import (
    differences,
    licence_warning,
    misfit_files,
    mismatches,
    other_parent,
    swap_signs,
)
from hf_locstitch.checkpoints.localizable import localizable, missed_blocks, reach, unknown_globs
from hf_locstitch.checkpoints.pairing import renaming_notes
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.checkpoints.side_files import check_processor
from hf_locstitch.checkpoints.vocabulary import token_matrices
from hf_locstitch.errors import MismatchError, RecipeError
from hf_locstitch.localize.localizer import Localizer
from hf_locstitch.plan.adapter_inputs import adapter_warnings
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.plan.vocabulary import LOCALIZE, VocabularyPlan
from hf_locstitch.runtime.human import counted, more
from hf_locstitch.runtime.settings import Settings
from hf_locstitch.stitch.per_tensor import SMALLEST_SUM, PerTensor, Weights, globs_of
from hf_locstitch.tasks.benchmarks import EvaluateOptions, chosen_tasks
from hf_locstitch.tasks.custom_code import refuse_custom_code
from hf_locstitch.tasks.leaks import JudgedTask, judged_set, leaks
from hf_locstitch.tasks.sets import OpenSet

ALL = ("*",)
# Fields of a recipe that apply to a merged model only.
OF_MODELS = ("scale", "rest_from", "files_from", "tokenizer", "embeddings", "chat_template", "also_copy", "dtype",
             "shard_size", "evaluate", "adapter")  # fmt: skip


def check_inputs(
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
    if data and (stored := [one for one in (base, *finetuned.values()) if one.dequantized]):
        raise RecipeError(
            f"{stored[0].label} is stored in {stored[0].dequantized}{more(len(stored))}, but a localizer that uses "
            "data has transformers load the weights as they are in files. Use the localizer magnitude, or a checkpoint "
            "in bfloat16."
        )
    if recipe.fitting is not None and not settings.cache:
        raise RecipeError(
            f"{recipe.fitting.called} reads the finetunes repeatedly, a layer at a time: it cannot be combined with "
            "--no-cache. Drop one of the two."
        )
    if recipe.localizer is not None and recipe.localizer.joint and recipe.stitch is None:
        raise RecipeError(
            f"the values under a {recipe.localizer.method} mask are solved for together: it needs a refit. Add "
            "--stitch refit (stitch: refit in a recipe)."
        )
    if purpose := _loads_models(recipe, data):
        for checkpoint in (base, *finetuned.values()):
            refuse_custom_code(checkpoint, purpose)
        if data or fit_data or recipe.evaluate is not None:
            for checkpoint in finetuned.values():
                check_processor((checkpoint, base), purpose)
    everywhere = list(dict.fromkeys([*base.tensors, *(t for one in finetuned.values() for t in one.tensors)]))
    unknown = unknown_globs(list(base.tensors), recipe.include, "the base")
    problems = [*unknown, *unknown_globs(everywhere, recipe.exclude, "the base or a finetune")]
    for asked in ("rest_from", "files_from"):
        problems += _unknown_name(asked, getattr(recipe, asked), list(finetuned))
    swapped, swaps = swap_signs(base, finetuned)
    problems += swapped
    chosen = chosen_tensors(recipe, base)
    if not chosen and not unknown:
        problems.append(_why_none(recipe, base))
    warnings, matrices = list(_made_names(recipe, finetuned)), token_matrices(base)
    for name, checkpoint in finetuned.items():
        candidates = chosen_tensors(recipe, checkpoint, matrices)
        found = mismatches(base, checkpoint, chosen, candidates)
        problems += ["; ".join([found[0], *other_parent(base, checkpoint)]), *found[1:]] if found else []
        warnings += renaming_notes(name, checkpoint)
        warnings += differences(base, name, checkpoint, chosen, matrices if recipe.tokenizer else ())
    unloadable, doubtful = misfit_files(*given_files(recipe, base, finetuned))
    problems, warnings = problems + unloadable, warnings + doubtful
    if problems:
        raise MismatchError(problems)
    if not recipe.include and recipe.method.blocks_only:
        warnings += missed_blocks(reach((info for _, info in base.tensors.values()), chosen), base.label)
    warnings += adapter_warnings(recipe, base, finetuned, set(chosen))
    warnings += swaps
    warnings += licence_warning({"the base": base, **finetuned})
    warnings += leaks(judged_on(recipe.evaluate), recipe.used_data)
    warnings += recipe.fitting.warnings(fit_data) if recipe.fitting else []
    wanted = set(chosen)
    return [name for name in base.tensors if name in wanted], tuple(warnings)


def chosen_tensors(recipe: Recipe, model: Checkpoint, matrices: Sequence[str] | None = None) -> list[str]:
    """Names of the tensors of a model that the method ranges over. matrices: those with a row for each token."""
    # Without globs: the transformer blocks, recognized by name, or all tensors, depending on the method.
    include = recipe.include or (() if recipe.method.blocks_only else ALL)
    infos = [info for _, info in model.tensors.values()]
    chosen = localizable(infos, include, recipe.exclude)
    if recipe.embeddings is None:
        return chosen
    matrices = token_matrices(model) if matrices is None else matrices
    if recipe.embeddings != LOCALIZE:
        return [name for name in chosen if name not in matrices]
    wanted = {*chosen, *localizable((info for info in infos if info.name in matrices), ALL, recipe.exclude)}
    return [info.name for info in infos if info.name in wanted]


def check_weights(recipe: Recipe, weights: Mapping[str, PerTensor], chosen: Sequence[str]) -> None:
    """Whether settings by globs match the tensors that are merged, and weights can be divided by their sum.

    weights: by finetune. Raises RecipeError with every problem."""
    method = recipe.method
    by_globs = {f"method.{field}": getattr(method, field) for field in method.by_globs}
    by_globs |= {
        f"method.{field}.{i}": one for field in method.of_finetunes for i, one in enumerate(getattr(method, field))
    }
    by_globs |= {f"weights.{name}": weight for name, weight in weights.items()}
    problems = [
        problem
        for field, setting in by_globs.items()
        for problem in unknown_globs(chosen, globs_of(setting), f"what is merged ({field})")
    ]
    if method.normalized and weights:
        every = Weights([*weights.values(), *[1.0] * (len(recipe.finetuned) - len(weights))])
        if (tensor := next((name for name in chosen if abs(sum(every.of(name))) < SMALLEST_SUM), None)) is not None:
            problems.append(
                f"the weights of the finetunes in {tensor} add up to 0, and {method.name} divides by their sum; change "
                f"one{', or set normalize: false' if 'normalize' in type(method).model_fields else ''}"
            )
    if problems:
        raise RecipeError(f"{'; '.join(problems)}.")


def check_alignment(recipe: Recipe, settings: Settings, vocabulary: VocabularyPlan, with_data: bool) -> None:
    """Raises RecipeError if the recipe asks for something that cannot be done over matched rows."""
    if not vocabulary.localized:
        return
    called = f"the rows of {vocabulary.matrices[0]} are matched by tokens, and the method ranges over them"
    cure = "Leave embeddings and heads out of the method with --embeddings base"
    if not settings.cache:
        raise RecipeError(f"{called}: with --no-cache the inputs are not kept for that. {cure}, or drop --no-cache.")
    if with_data or recipe.fitting is not None:
        raise RecipeError(
            f"{called}: this cannot be combined with data or a fit, which take models as they are. {cure}."
        )


def _why_none(recipe: Recipe, base: Checkpoint) -> str:
    """Why no tensor of the base is localized."""
    looks = f"(its names look like {', '.join(list(base.tensors)[:3])})"
    given = [
        f"--{flag} {' '.join(globs)}"
        for flag, globs in (("include", recipe.include), ("exclude", recipe.exclude))
        if globs
    ]
    if not given:
        return f"no tensor of {base.label} is localizable {looks}; select tensors with --include"
    return f"{' and '.join(given)} select no floating-point tensor of {base.label} {looks}; use other globs"


def given_files(recipe: Recipe, base: Checkpoint, finetuned: Mapping[str, Checkpoint]) -> tuple[Checkpoint, Checkpoint]:
    """Where config and tokenizer come from, and the tensors that are not merged; the base for an unknown name."""
    unmasked_from = finetuned.get(recipe.rest_from, base) if recipe.rest_from else base
    files = finetuned.get(recipe.files_from, base) if recipe.files_from else unmasked_from.layout
    return files, unmasked_from


def _loads_models(recipe: Recipe, data: Mapping[str, OpenSet]) -> str | None:
    """What has transformers load the models; None if nothing does."""
    if data:
        return "a localizer that uses data"
    if recipe.fitting is not None:
        return recipe.fitting.called
    return "an evaluation" if recipe.evaluate is not None else None


def judged_on(asked: EvaluateOptions | None) -> list[JudgedTask]:
    """The tasks that a merge will be judged on, by their names: the data sets of lm-eval's are known to it only."""
    if asked is None:
        return []
    specs, _ = chosen_tasks(asked.tasks, asked.suite, asked.limit)
    return [*(JudgedTask(spec.name) for spec in specs), *(judged_set(name, one) for name, one in asked.data.items())]


def _unknown_name(field: str, value: str | None, names: list[str]) -> list[str]:
    if value is None or value in names:
        return []
    near = get_close_matches(value, names, n=1, cutoff=0.0)
    return [f"{field} is {value!r}, which is not one of the finetunes ({', '.join(names)}); did you mean {near[0]!r}?"]


def check_localizable(recipe: Recipe) -> None:
    """Raises RecipeError if a recipe asks for more than one finetune's mask and values."""
    if recipe.localized or len(recipe.finetuned) != 1:
        given = "localized checkpoints" if recipe.localized else counted(len(recipe.finetuned), "finetune")
        raise RecipeError(
            f"a localized checkpoint is made from one finetune, not from {given}. Localize them one at a time."
        )
    if recipe.method.name != "locstitch":
        raise RecipeError(f"localize finds masks for method locstitch, not for {recipe.method.name}. Drop --method.")
    if recipe.localizer is not None and recipe.localizer.joint:
        raise RecipeError(
            f"a {recipe.localizer.method} mask belongs to several finetunes at once: it is found in merge only. Use "
            "--localizer magnitude."
        )
    if recipe.stitch is not None and (recipe.stitch.data or not recipe.stitch.data_optional):
        raise RecipeError(
            f"{recipe.stitch.called} on inputs fits the values of all finetunes together: it works in merge only. Drop "
            "its data, or stitch."
        )
    if given := [field for field in OF_MODELS if getattr(recipe, field) != Recipe.model_fields[field].default]:
        raise RecipeError(f"{', '.join(given)} cannot be set for a localized checkpoint. Set this when stitching.")


def check_kept(localizer: Localizer | None, n: int, k: int) -> None:
    """Raises RecipeError if a density above 0 is so small that masks over n elements keep none."""
    if localizer is not None and localizer.density and n and not k:
        raise RecipeError(
            f"density {localizer.density:g} keeps none of the {n:,} localizable elements: the masks would be empty, "
            "and the result the base. Use a larger share, such as 0.1."
        )


def _made_names(recipe: Recipe, names: Iterable[str]) -> Iterator[str]:
    """A sentence for each finetune that goes by another name than its own."""
    for entry, name in zip(recipe.finetuned, names, strict=False):
        if entry.name is None and (own := parse_ref(entry.ref).name) != name:
            yield f"the finetune {own!r} is called {name}: its own name cannot be a file's. --names sets another."


def kept_name(recipe: Recipe, finetuned: Mapping[str, Checkpoint]) -> str:
    """Whose config and tokenizer the output gets."""
    name = recipe.files_from or recipe.rest_from or "the base"
    return name if name not in finetuned or finetuned[name].layout is finetuned[name] else "the base"

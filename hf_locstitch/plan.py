"""The plan of a merge: pure data from a recipe and headers. Nothing here reads a weight or writes a byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.pieces import Piece, Pieces, byte_ranges
from hf_locstitch.data.sets import LocalizationSet, OpenSet
from hf_locstitch.errors import MismatchError, RecipeError
from hf_locstitch.finetunes import differences, licence_warning, mismatches
from hf_locstitch.localize.localizer import Localizer
from hf_locstitch.localize.with_data import WithData
from hf_locstitch.methods import Dense, Masked, find_method
from hf_locstitch.output import OutputShard, output_shards
from hf_locstitch.recipe import Recipe
from hf_locstitch.select import localizable, unknown_globs
from hf_locstitch.settings import DEFAULT, Settings

if TYPE_CHECKING:
    from hf_locstitch.localized.checkpoint import LocalizedCheckpoint

Target = Literal["model", "localized"]

ALL = ("*",)


@dataclass(frozen=True)
class MergePlan:
    """n: elements of the localized tensors of one model (N). k: coordinates that each mask keeps, n without masks.

    rest: the checkpoint of the tensors that are not localized. files: that of config, tokenizer and the like.
    target: what is made; a localized checkpoint has one shard, of values, whose sizes are a guess.
    given: localized checkpoints, where masks and values were found before; `finetuned` then holds their files, none
    of whose tensors is a model's, and k is the largest of theirs.
    """

    recipe: Recipe
    settings: Settings
    base: Checkpoint
    finetuned: Mapping[str, Checkpoint]
    rest: Checkpoint
    files: Checkpoint
    shards: tuple[OutputShard, ...]
    n: int
    k: int
    warnings: tuple[str, ...]
    data: Mapping[str, OpenSet] = field(default_factory=dict)
    """The localization set of each finetune, for localizers that look at data."""
    target: Target = "model"
    given: Mapping[str, LocalizedCheckpoint] = field(default_factory=dict)
    refit_data: Mapping[str, OpenSet] = field(default_factory=dict)
    """The unlabelled inputs of each finetune, for a refit."""

    @property
    def command(self) -> str:
        """The sub-command that carries out such a plan."""
        return "stitch" if self.given else "merge" if self.target == "model" else "localize"

    @property
    def localized(self) -> list[TensorInfo]:
        """The localized tensors as the base holds them, in the base's order."""
        chosen = {tensor.name for shard in self.shards for tensor in shard.tensors if tensor.localized}
        return [info for name, (_, info) in self.base.tensors.items() if name in chosen]

    @property
    def method(self) -> Dense | Masked:
        return find_method(self.recipe.method)

    @property
    def masked(self) -> bool:
        """Whether the method localizes."""
        return isinstance(self.method, Masked)

    @property
    def localizes(self) -> bool:
        """Whether masks are found here, and not given."""
        return self.masked and not self.given

    @property
    def localizer(self) -> Localizer:
        """Of a plan that localizes."""
        assert self.recipe.localizer is not None
        return self.recipe.localizer

    @property
    def localizers(self) -> dict[str, Localizer]:
        """How each mask is found, or was."""
        if self.given:
            return {name: one.localizer for name, one in self.given.items()}
        return dict.fromkeys(self.finetuned, self.localizer) if self.masked else {}

    @property
    def common_localizer(self) -> dict[str, Any] | None:
        """How all masks are found, as JSON; None if they differ, or there are none."""
        settings = [localizer.model_dump(mode="json") for localizer in self.localizers.values()]
        return settings[0] if settings and all(one == settings[0] for one in settings) else None

    @property
    def origins(self) -> dict[str, str]:
        """The finetuned model that each mask belongs to, pinned."""
        if self.given:
            return {name: one.finetuned.ref for name, one in self.given.items()}
        return {name: checkpoint.source.pinned for name, checkpoint in self.finetuned.items()}

    @property
    def groups(self) -> list[tuple[list[int], int]]:
        """Which of `localized` (by number) compete with one another, and how many elements each group keeps."""
        return self.localizer.groups([info.numel for info in self.localized])

    @property
    def rounded(self) -> bool:
        """Whether masks keep as many elements as they will, of which k is a guess."""
        if self.given:
            return len({one.ones for one in self.given.values()}) > 1
        return self.masked and self.localizer.density is None

    @property
    def inputs(self) -> dict[str, Checkpoint]:
        return {"base": self.base, **self.finetuned}

    @property
    def order(self) -> list[str]:
        """In which finetunes are added up: of the models' own, however they were given, as sums round."""
        return sorted(self.finetuned, key=self.origins.__getitem__)

    @property
    def scanned(self) -> Pieces:
        """What localizing reads."""
        pieces = [(info.name, 0, info.numel) for info in self.localized] if self.localizes else []
        return dict.fromkeys(self.inputs, pieces) if pieces else {}

    def combined(self, shards: Sequence[OutputShard]) -> Pieces:
        """What writing these shards reads, besides what localizing kept."""
        if self.target == "localized":
            return {}
        pieces: dict[str, list[Piece]] = {}
        rest = next(name for name, checkpoint in self.inputs.items() if checkpoint is self.rest)
        for tensor in (tensor for shard in shards for tensor in shard.tensors):
            readers = ["base"] if self.masked else list(self.inputs)
            for name in readers if tensor.localized else [rest]:
                pieces.setdefault(name, []).append((tensor.name, 0, math.prod(tensor.shape)))
        return pieces

    @property
    def needed(self) -> dict[str, list[str]]:
        """The files of each input that are read at all."""
        passes = [self.scanned, self.combined(self.shards)]
        return {name: [shard.file for shard in self.finetuned[name].shards] for name in self.given} | {
            name: list(byte_ranges(checkpoint, [piece for pieces in passes for piece in pieces.get(name, ())]))
            for name, checkpoint in self.inputs.items()
            if name not in self.given
        }

    @property
    def all_here(self) -> bool:
        """Whether every file that is read is on this machine by now."""
        return all(self.inputs[name].source.cached(file) for name, files in self.needed.items() for file in files)


def finetuned_names(recipe: Recipe, defaults: Sequence[str]) -> list[str]:
    """The finetunes' names. Raises RecipeError if two are alike."""
    names = [entry.name or default for entry, default in zip(recipe.entries, defaults, strict=True)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(
            f"two finetunes are named {twice[0]!r} ({', '.join(names)}); each names a mask file. Set --names."
        )
    if "base" in names:
        raise RecipeError("a finetune is named 'base', which is what the base is called. Set --names.")
    return names


def data_sets(recipe: Recipe, names: Sequence[str]) -> dict[str, LocalizationSet]:
    """The localization set of each finetune, as asked for. Raises RecipeError if the recipe names others."""
    return _by_name(recipe.data, names) if isinstance(recipe.localizer, WithData) else {}


def refit_sets(recipe: Recipe, names: Sequence[str]) -> dict[str, LocalizationSet]:
    """The inputs of each finetune for a refit, if there is to be one. Raises RecipeError if the recipe names others."""
    return _by_name(recipe.stitch.data or recipe.data, names) if recipe.stitch else {}


def _by_name(
    sets: Mapping[str, LocalizationSet] | Sequence[LocalizationSet], names: Sequence[str]
) -> dict[str, LocalizationSet]:
    if not isinstance(sets, Mapping):
        return dict(zip(names, sets, strict=False))
    if unknown := sorted(set(sets) - set(names)):
        raise RecipeError(f"data is given for {unknown[0]!r}, which is none of the finetunes ({', '.join(names)}).")
    return {name: sets[name] for name in names if name in sets}


def make_plan(
    recipe: Recipe,
    base: Checkpoint,
    finetuned: Mapping[str, Checkpoint],
    settings: Settings = DEFAULT,
    data: Mapping[str, OpenSet] = MappingProxyType({}),
    refit_data: Mapping[str, OpenSet] = MappingProxyType({}),
) -> MergePlan:
    """Plan the merge. Raises MismatchError with all that the headers show to be wrong."""
    if data and not settings.cache:
        raise RecipeError("a localizer that looks at data loads whole models: it does not go with --no-cache.")
    if refit_data and not settings.cache:
        what = "a refit" if recipe.method == "locstitch" else find_method(recipe.method).title
        raise RecipeError(
            f"{what} reads the finetunes again and again, a layer at a time: it does not go with --no-cache. Drop one "
            "of the two."
        )
    problems = unknown_globs(list(base.tensors), [*recipe.include, *recipe.exclude])
    for asked in ("rest_from", "files_from"):
        problems += _unknown_name(asked, getattr(recipe, asked), list(finetuned))
    include = _default_include(recipe)
    chosen = localizable((info for _, info in base.tensors.values()), include, recipe.exclude)
    if not chosen:
        problems.append(
            f"no tensor of {base.label} is localizable (names are such as {', '.join(list(base.tensors)[:3])}); "
            "say which are with --include"
        )
    warnings: list[str] = []
    for name, checkpoint in finetuned.items():
        theirs = localizable((info for _, info in checkpoint.tensors.values()), include, recipe.exclude)
        problems += mismatches(base, checkpoint, chosen, theirs)
        warnings += differences(base, name, checkpoint, chosen)
    if problems:
        raise MismatchError(problems)

    warnings += licence_warning({"the base": base, **finetuned})
    warnings += [*_leaks(recipe, data), *_leaks(recipe, refit_data, "fitted")]
    warnings += recipe.stitch.warnings() if recipe.stitch else []
    rest = finetuned[recipe.rest_from] if recipe.rest_from else base
    files = finetuned[recipe.files_from] if recipe.files_from else rest
    shards = output_shards(recipe, base, rest, frozenset(chosen))
    n = sum(base.info(name).numel for name in chosen)
    k = recipe.localizer.kept([base.info(name).numel for name in chosen]) if recipe.localizer else n
    return MergePlan(recipe, settings, base, finetuned, rest, files, shards, n, k, tuple(warnings), data,
                     refit_data=refit_data)  # fmt: skip


def _default_include(recipe: Recipe) -> Sequence[str]:
    """The globs asked for; without any, blocks (told from names, no glob) or all tensors, as the method has it."""
    method = find_method(recipe.method)
    blocks_only = isinstance(method, Masked) and method.blocks_only
    return recipe.include or (() if blocks_only else ALL)


def _unknown_name(field: str, value: str | None, names: list[str]) -> list[str]:
    if value is None or value in names:
        return []
    near = get_close_matches(value, names, n=1, cutoff=0.0)
    return [f"{field} names {value!r}, which is none of the finetunes ({', '.join(names)}); did you mean {near[0]!r}?"]


def _leaks(recipe: Recipe, data: Mapping[str, OpenSet], done: str = "localized") -> list[str]:
    """Sets that finetunes are localized or fitted with, and that, by their names, the merge is also judged on."""
    tasks = [task.partition(":")[0] for task in recipe.evaluate.tasks] if recipe.evaluate else []
    return [
        f"{name} is {done} with {found.label}, and {task} is among the tasks it is judged on: held-out figures of "
        "that task are none. Take other data."
        for name, found in data.items()
        for task in tasks
        if found.repo is not None and found.repo.rpartition("/")[2].lower() in task.lower()
    ]

"""The plan of a merge: pure data from a recipe and headers. Nothing here reads a weight or writes a byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from hf_locstitch.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from hf_locstitch.checkpoints.header import FLOATING, ITEM_BYTES, TensorInfo
from hf_locstitch.checkpoints.pieces import Piece, Pieces, byte_ranges
from hf_locstitch.data.sets import LocalizationSet, OpenSet
from hf_locstitch.errors import MismatchError, RecipeError
from hf_locstitch.localize.localizer import Localizer
from hf_locstitch.localize.with_data import WithData
from hf_locstitch.methods import Dense, Masked, find_method
from hf_locstitch.recipe import Recipe
from hf_locstitch.select import localizable, unknown_globs
from hf_locstitch.settings import DEFAULT, Settings

if TYPE_CHECKING:
    from hf_locstitch.localized.checkpoint import LocalizedCheckpoint

Target = Literal["model", "localized"]

ALL = ("*",)
DTYPE_ON_DISK = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output. dtype: on disk, of the output. localized: whether the method ranges over it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    localized: bool


@dataclass(frozen=True)
class OutputShard:
    file: str
    tensors: tuple[PlannedTensor, ...]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def entries(self) -> list[tuple[str, str, tuple[int, ...], int]]:
        """Name, dtype, shape and bytes of each tensor, as a file's header has them."""
        return [(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in self.tensors]


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
        problems += _mismatches(recipe, base, checkpoint, chosen)
        warnings += _differences(base, name, checkpoint, chosen)
    if problems:
        raise MismatchError(problems)

    warnings += licence_warning({"the base": base, **finetuned})
    warnings += [*_leaks(recipe, data), *_leaks(recipe, refit_data, "fitted")]
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


def _mismatches(recipe: Recipe, base: Checkpoint, other: Checkpoint, chosen: Sequence[str]) -> list[str]:
    """What makes `other` no finetune of the base, as far as headers and configs tell."""
    problems = []
    if not _model_types(base) & _model_types(other) and other.config and base.config:
        problems.append(
            f"{other.label} is a {other.config.get('model_type')} model, "
            f"the base {base.label} a {base.config.get('model_type')} model"
        )
    problems += _name_mismatches(recipe, base, other, chosen)
    shared = [name for name in chosen if name in other.tensors]
    shapes = [(name, other.info(name).shape, base.info(name).shape) for name in shared]
    if wrong := [(name, got, due) for name, got, due in shapes if got != due]:
        name, got, due = wrong[0]
        problems.append(
            f"{name} is {list(got)} in {other.label} but {list(due)} in the base {base.label}{more(len(wrong))}; "
            "a finetune must share the base's shapes; leave tensors out with --exclude"
        )
    if packed := [name for name in shared if not other.info(name).floating]:
        problems.append(
            f"{packed[0]} is {other.info(packed[0]).dtype} in {other.label} "
            f"but {base.info(packed[0]).dtype} in the base{more(len(packed))}: "
            "quantized or packed weights cannot be compared; name the full checkpoint"
        )
    return problems


def _model_types(checkpoint: Checkpoint) -> set[str | None]:
    """The architecture and its parts: a CLIP vision tower may be merged into a CLIP model."""
    parts = [part for part in checkpoint.config.values() if isinstance(part, dict)]
    return {part.get("model_type") for part in (checkpoint.config, *parts)}


def _name_mismatches(recipe: Recipe, base: Checkpoint, other: Checkpoint, chosen: Sequence[str]) -> list[str]:
    theirs = localizable((info for _, info in other.tensors.values()), _default_include(recipe), recipe.exclude)
    missing = [name for name in chosen if name not in other.tensors]
    extra = [name for name in theirs if name not in base.tensors]
    problems = []
    if missing:
        problems.append(f"{other.label} lacks {missing[0]}, which the base {base.label} has{more(len(missing))}")
    if extra:
        problems.append(f"{other.label} has {extra[0]}, which the base {base.label} lacks{more(len(extra))}")
    if missing and extra and (prefix := _common_prefix(missing, extra)):
        problems[-1] += f" (one side's names begin with {prefix!r}: save both models with the same class)"
    return problems


def _common_prefix(missing: Sequence[str], extra: Sequence[str]) -> str | None:
    """The prefix that alone tells the two sets of names apart, if there is one."""
    for longer, shorter in ((missing, extra), (extra, missing)):
        for name in shorter:
            match = next((other for other in longer if other.endswith("." + name)), None)
            if match is not None:
                return match.removesuffix(name)
    return None


def _differences(base: Checkpoint, name: str, other: Checkpoint, chosen: Sequence[str]) -> list[str]:
    """What differs without hindering the merge: said, so that nobody wonders afterwards."""
    localized = set(chosen)
    unlike = [
        f"{tensor} {list(other.info(tensor).shape)} (base {list(base.info(tensor).shape)})"
        for tensor in base.tensors
        if tensor not in localized and tensor in other.tensors and other.info(tensor).shape != base.info(tensor).shape
    ]
    unlike += [f"{tensor} (not in the base)" for tensor in other.tensors if tensor not in base.tensors]
    unlike += [f"{t} (only in the base)" for t in base.tensors if t not in other.tensors and t not in localized]
    warnings = []
    if unlike:
        shown = ", ".join(unlike[:3]) + more(min(len(unlike), len(unlike) - 2))
        warnings.append(f"{name} differs outside the localized tensors: {shown}. The base's are kept.")
    if all(t in other.tensors for t in chosen):
        warnings += dtype_warnings(name, [(other.info(t).dtype, base.info(t).dtype) for t in chosen])
    return warnings


def dtype_warnings(name: str, dtypes: Iterable[tuple[str, str]]) -> list[str]:
    """dtypes: of each localized tensor, in the finetune and in the base."""
    return [
        f"{name} is {theirs} where the base is {ours}: compared in float32, cast to {ours}."
        for theirs, ours in sorted(set(dtypes))
        if theirs != ours
    ]


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


def licence_warning(checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    licences = {name: str(checkpoint.card.get("license", "none named")) for name, checkpoint in checkpoints.items()}
    if len(set(licences.values())) == 1:
        return []
    said = ", ".join(f"{name}: {licence}" for name, licence in licences.items())
    return [f"the licences differ ({said}): a merge is bound by all of them."]


def more(count: int) -> str:
    """' (and 2 more)' for three in all."""
    return f" (and {count - 1} more)" if count > 1 else ""


def output_shards(
    recipe: Recipe, base: Checkpoint, rest: Checkpoint, chosen: frozenset[str]
) -> tuple[OutputShard, ...]:
    """Names and order as in the checkpoint that gives the rest, unless a shard size is asked for."""
    planned = [
        [_planned(recipe, base, info, info.name in chosen) for info in shard.header.tensors] for shard in rest.shards
    ]
    metadata = dict(rest.shards[0].header.metadata) or {"format": "pt"}
    if recipe.shard_size is None:
        files = _standard_files(rest, len(planned))
        return tuple(OutputShard(f, tuple(ts), metadata) for f, ts in zip(files, planned, strict=True))
    groups = _pack([tensor for tensors in planned for tensor in tensors], int(recipe.shard_size))
    return tuple(OutputShard(shard_name(i, len(groups)), tuple(group), metadata) for i, group in enumerate(groups))


def _standard_files(rest: Checkpoint, count: int) -> list[str]:
    """The shards' own names where transformers will find them, else standard ones."""
    files = [shard.file for shard in rest.shards]
    found = files == [SINGLE] or (INDEX in rest.source.files and SINGLE not in files)
    return files if found else [shard_name(i, count) for i in range(count)]


def shard_name(i: int, count: int) -> str:
    """File name of shard i (from 0) of count."""
    return SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _pack(tensors: Sequence[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    """Cut the sequence wherever the next tensor would pass `limit` bytes; a larger tensor stands alone."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups


def _planned(recipe: Recipe, base: Checkpoint, info: TensorInfo, localized: bool) -> PlannedTensor:
    source = base.info(info.name) if localized else info
    dtype, nbytes = source.dtype, source.nbytes
    if recipe.dtype != "auto" and dtype in FLOATING:
        dtype = DTYPE_ON_DISK[recipe.dtype]
        nbytes = source.numel * ITEM_BYTES[dtype]
    return PlannedTensor(info.name, dtype, source.shape, nbytes, localized)

"""Plans: everything to be done, as plain data from a recipe and headers. None reads weights or queries the disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint
from hf_locstitch.artifacts.manifest import JOINT, mask_file
from hf_locstitch.artifacts.merged_finetune import MergedFinetune
from hf_locstitch.checkpoints.adapter import AdapterCheckpoint
from hf_locstitch.checkpoints.aligned import Alignment
from hf_locstitch.checkpoints.byte_ranges import Piece, Pieces, byte_ranges
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.lineage import Lineage
from hf_locstitch.checkpoints.side_files import SideFiles
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.localize.job import Group
from hf_locstitch.localize.localizer import Localizer
from hf_locstitch.localize.shared_scan import SharedScan
from hf_locstitch.plan.layout import OutputShard
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.plan.vocabulary import VocabularyPlan
from hf_locstitch.runtime import html
from hf_locstitch.runtime.settings import Settings
from hf_locstitch.stitch.per_tensor import PerTensor
from hf_locstitch.tasks.sets import OpenSet


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The fields common to all plans.

    inputs: "base", and by name the finetunes; for a stitch their localized checkpoints' files, whose tensors are not
    a model's. mask_tensors: those that the method ranges over, as the base holds them, in its order; n: their elements
    (N). k: coordinates that each mask keeps, n without masks; exact_k: else k is a guess, or the largest of several.
    localizers: how each mask is found, or was; origins: the finetuned model that each belongs to, pinned. order: in
    which finetunes are summed; independent of the order given, because sums round. scanned: what finding
    masks reads.
    """

    recipe: Recipe
    settings: Settings
    inputs: Mapping[str, Checkpoint]
    shards: tuple[OutputShard, ...]
    mask_tensors: tuple[TensorInfo, ...]
    n: int
    k: int
    exact_k: bool
    localizers: Mapping[str, Localizer]
    origins: Mapping[str, str]
    order: tuple[str, ...]
    scanned: Pieces
    warnings: tuple[str, ...]
    data: Mapping[str, OpenSet] = field(default_factory=dict)
    """The localization set of each finetune, for localizers that look at data."""
    fit_data: Mapping[str, OpenSet] = field(default_factory=dict)
    """The unlabelled inputs of each finetune, where values are fitted."""
    weights: Mapping[str, PerTensor] = field(default_factory=dict)
    """The factor on each finetune's task vector, where the recipe gives one; 1 elsewhere."""
    lineage: Mapping[str, Lineage] = field(default_factory=dict)
    """What a sample tells of each finetune, where one could be taken before the work."""
    notes: tuple[str, ...] = ()
    """What is worth knowing, and nothing to warn of."""
    shared: SharedScan | None = None
    """Where the scores of the localizer stay for other merges of the same finetunes."""
    command: ClassVar[str]
    """The sub-command that carries out such a plan."""

    @property
    def base(self) -> Checkpoint:
        return self.inputs["base"]

    @property
    def finetuned(self) -> dict[str, Checkpoint]:
        return {name: checkpoint for name, checkpoint in self.inputs.items() if name != "base"}

    @property
    def solved(self) -> bool:
        """Whether values or a mask are solved for, from several passes over the inputs."""
        return self.recipe.fitting is not None or self.joint

    @property
    def joint(self) -> bool:
        """Whether all finetunes share one mask."""
        return any(localizer.joint for localizer in self.localizers.values())

    @property
    def adapters(self) -> dict[str, AdapterCheckpoint]:
        """Those of the finetunes that are adapters over the base."""
        return {name: one for name, one in self.inputs.items() if isinstance(one, AdapterCheckpoint)}

    @property
    def dequantized(self) -> dict[str, str]:
        """From what the bfloat16 weights are computed, of the inputs that are stored quantized."""
        return {name: one.dequantized for name, one in self.inputs.items() if one.dequantized}

    @property
    def merges(self) -> dict[str, Source]:
        """The merges that the masks of inputs come from, by the inputs' names."""
        return {}

    @property
    def masked(self) -> bool:
        """Whether there are masks."""
        return bool(self.localizers)

    def mask_file(self, name: str) -> str:
        """The file of a finetune's mask; a joint mask is that of all."""
        return mask_file(JOINT if self.localizers[name].joint else name)

    @property
    def common_localizer(self) -> dict[str, Any] | None:
        """How all masks are found, as JSON; None if they differ, or there are none."""
        settings = [localizer.model_dump(mode="json") for localizer in self.localizers.values()]
        return settings[0] if settings and all(other == settings[0] for other in settings) else None

    @property
    def aligned(self) -> Alignment | None:
        """Where the method sees the inputs in the rows of another vocabulary than their own: how."""
        return None

    def written_from(self, shards: Sequence[OutputShard]) -> Pieces:
        """What writing these shards reads, besides what finding masks kept."""
        return {}

    def kept_for(self, shards: Sequence[OutputShard]) -> Pieces:
        """What stays on the disk from the first pass until these shards are written, where inputs are streamed.

        The base only where the output takes its place there: of a result that is only pushed, it is read twice.
        """
        whole = self.recipe.out is not None
        return {name: pieces for name, pieces in self.written_from(shards).items() if whole or name != "base"}

    @property
    def needed(self) -> dict[str, list[str]]:
        """The files of each input that are read: with data all of them, because whole models run."""
        if self.data or self.fit_data or self.solved:
            return {name: [shard.file for shard in one.shards] for name, one in self.inputs.items()}
        passes = [self.scanned, self.written_from(self.shards)]
        return {
            name: list(byte_ranges(checkpoint, [piece for pieces in passes for piece in pieces.get(name, ())]))
            for name, checkpoint in self.inputs.items()
        }

    def _repr_html_(self) -> str:
        """For notebooks: what `format_plan` prints."""
        from hf_locstitch.plan.describe import format_plan  # which imports this module

        return html.page(html.summary(format_plan(self)))


@dataclass(frozen=True, kw_only=True)
class LocalizePlan(Plan):
    """From one finetune to a localized checkpoint, which has one shard, of values, whose sizes are a guess.

    groups: which of mask_tensors (by number) compete with one another, and how many elements each group keeps.
    """

    groups: tuple[Group, ...]
    command: ClassVar[str] = "localize"

    @property
    def localizer(self) -> Localizer:
        return next(iter(self.localizers.values()))


@dataclass(frozen=True, kw_only=True)
class ModelPlan(Plan):
    """A plan that ends in a model. unmasked_from: the checkpoint of the tensors that are not merged. files: that of
    config, tokenizer and the like."""

    unmasked_from: Checkpoint
    files: Checkpoint
    vocabulary: VocabularyPlan | None = None
    """Where the rows of embeddings and heads come from, where that is not simply `unmasked_from`."""
    side_files: SideFiles = field(default_factory=SideFiles)
    """Which of these go along with the weights."""

    @property
    def whole_models(self) -> Mapping[str, Checkpoint]:
        """The finetunes whose tokens and files the output may have."""
        return self.finetuned

    @property
    def aligned(self) -> Alignment | None:
        return self.vocabulary.alignment if self.vocabulary is not None and self.vocabulary.localized else None

    def written_from(self, shards: Sequence[OutputShard]) -> Pieces:
        pieces: dict[str, list[Piece]] = {}
        unmasked = next(name for name, checkpoint in self.inputs.items() if checkpoint is self.unmasked_from)
        for tensor in (tensor for shard in shards for tensor in shard.tensors):
            merged = ["base"] if self.masked else list(self.inputs)
            if self.vocabulary is not None and tensor.name in self.vocabulary.matrices:
                for name, piece in self.vocabulary.alignment.pieces(tensor.name):
                    pieces.setdefault(name, []).append(piece)
                if not tensor.localized:
                    continue
            for name in merged if tensor.localized else [unmasked]:
                pieces.setdefault(name, []).append((tensor.name, 0, math.prod(tensor.shape)))
        return pieces


@dataclass(frozen=True, kw_only=True)
class MergePlan(ModelPlan):
    """From finetunes to a model. groups: as of LocalizePlan, none for a method without masks."""

    groups: tuple[Group, ...]
    command: ClassVar[str] = "merge"

    @property
    def localizer(self) -> Localizer:
        """Of a plan with masks."""
        return next(iter(self.localizers.values()))


@dataclass(frozen=True, kw_only=True)
class StitchPlan(ModelPlan):
    """From localized checkpoints to a model. merged_inputs: finetunes whose masks a merge holds, in place of some."""

    localized_inputs: Mapping[str, LocalizedCheckpoint]
    merged_inputs: Mapping[str, MergedFinetune] = field(default_factory=dict)
    command: ClassVar[str] = "stitch"

    @property
    def needed(self) -> dict[str, list[str]]:
        stored = {name: [shard.file for shard in one.shards] for name, one in self.localized_inputs.items()}
        return {**super().needed, **stored}

    @property
    def whole_models(self) -> Mapping[str, Checkpoint]:
        return {name: one.checkpoint for name, one in self.merged_inputs.items()}

    @property
    def merges(self) -> dict[str, Source]:
        return {name: one.source for name, one in self.merged_inputs.items()}

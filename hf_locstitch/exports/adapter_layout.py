"""How changes lie in a PEFT adapter: linear layers by entries, other modules whole; judging by headers and masks.

PEFT's SHiRA adds a sparse matrix to the weight of a linear layer, and all its layers have one rank. What it has no form
for (biases, norms, embeddings, layers that are no nn.Linear, stacked experts) is stored as whole modules
(`modules_to_save`).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from hf_locstitch.adapters.adapted_model import PREFIX, Skeleton
from hf_locstitch.adapters.settings import short
from hf_locstitch.checkpoints.checkpoint import CONFIG, Checkpoint
from hf_locstitch.checkpoints.config import architecture
from hf_locstitch.checkpoints.header import TensorSpec
from hf_locstitch.errors import CheckpointError, RequestError
from hf_locstitch.exports.sparse_layout import VALUE_BYTES, Linear, best_rank
from hf_locstitch.runtime.dtypes import ITEM_BYTES
from hf_locstitch.runtime.human import some
from hf_locstitch.tasks.custom_code import refuse_custom_code
from hf_locstitch.tasks.parameter_names import Group

MASK_TYPE = "localized"  # none of PEFT's own: it then draws no random mask while it loads
TASKS = {"ForCausalLM": "CAUSAL_LM"}  # the only task for which PEFT adds no modules of its own
SMALLER, BIASED = "that are smaller so", "with a changed bias"  # why a linear layer is stored whole


@dataclass(frozen=True)
class Changed:
    """What a localized checkpoint or a merge, as kind says, changes in its base; or a merge that is yet to be made.

    ones: of each tensor that is changed, in how many elements.
    """

    label: str
    kind: str
    base: Checkpoint
    ones: Mapping[str, int]


@dataclass(frozen=True)
class SparseLayer:
    """A linear layer by entries. tensor: its weight, on disk."""

    module: str
    tensor: str
    sizes: Linear


@dataclass(frozen=True)
class WholeModule:
    """A module with all its values. why: it is not stored by entries. parameters: local name -> canonical name."""

    module: str
    why: str
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class AdapterLayout:
    """skeleton: the base as transformers builds it. class_name: of that model. rank: 0 without sparse layers."""

    skeleton: Skeleton = field(repr=False)
    base: Checkpoint = field(repr=False)
    class_name: str
    rank: int
    sparse: tuple[SparseLayer, ...]
    whole: tuple[WholeModule, ...]

    @cached_property
    def specs(self) -> list[TensorSpec]:
        """The tensors of its file, wider dtypes first."""
        specs = [*self._sparse_specs(), *self._whole_specs()]
        return sorted(specs, key=lambda spec: -ITEM_BYTES[spec.dtype])

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)

    @property
    def entries(self) -> int:
        return sum(layer.sizes.entries(self.rank) for layer in self.sparse)

    @property
    def whole_bytes(self) -> int:
        """Of the modules that are stored whole."""
        return sum(spec.nbytes for spec in self._whole_specs())

    @property
    def why(self) -> str:
        """Why modules are stored whole, and how many."""
        counts = Counter(module.why for module in self.whole)
        return ", ".join(f"{count} {why}" for why, count in counts.items())

    @property
    def mergeable(self) -> bool:
        """Whether PEFT's merge_and_unload works: it looks for a `weight` in each module that is stored whole."""
        return all("weight" in module.parameters for module in self.whole)

    def _sparse_specs(self) -> Iterator[TensorSpec]:
        for layer in self.sparse:
            count, size = layer.sizes.entries(self.rank), layer.sizes.index_bytes
            yield TensorSpec(weight_key(layer), "F32", (count,), count * VALUE_BYTES)
            yield TensorSpec(indices_key(layer), "I16" if size == 2 else "I32", (2, count), 2 * count * size)

    def _whole_specs(self) -> Iterator[TensorSpec]:
        for module in self.whole:
            for local, parameter in module.parameters.items():
                shape, dtype = self.skeleton.shapes[parameter], self.dtype(parameter)
                yield TensorSpec(whole_key(module, local), dtype, tuple(shape), shape.numel() * ITEM_BYTES[dtype])

    def dtype(self, parameter: str) -> str:
        """In which the base stores it."""
        return self.base.info(self.skeleton.groups[parameter][0].disk[0]).dtype

    def config(self) -> dict[str, Any]:
        """The adapter's adapter_config.json."""
        from peft import ShiraConfig
        from peft.utils.constants import DUMMY_TARGET_MODULES

        task = next((task for end, task in TASKS.items() if self.class_name.endswith(end)), None)
        config = ShiraConfig(
            base_model_name_or_path=self.base.source.repo,
            revision=self.base.source.commit,
            task_type=task,
            inference_mode=True,
            r=max(self.rank, 1),
            mask_type=MASK_TYPE,  # pyright: ignore[reportArgumentType]
            target_modules=[layer.module for layer in self.sparse] or DUMMY_TARGET_MODULES,
            modules_to_save=[module.module for module in self.whole] or None,
        )
        if task is None:
            made_by = {"base_model_class": self.class_name, "parent_library": type(self.skeleton.model).__module__}
            config.auto_mapping = made_by
        fields = config.to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(fields.items())}


def weight_key(layer: SparseLayer) -> str:
    return f"{PREFIX}{layer.module}.shira_weight"


def indices_key(layer: SparseLayer) -> str:
    return f"{PREFIX}{layer.module}.shira_indices"


def whole_key(module: WholeModule, local: str) -> str:
    return f"{PREFIX}{module.module}.{local}"


def lay_out(changes: Changed) -> AdapterLayout:
    """Raises RequestError, with every reason, if an adapter cannot hold the changes."""
    if not changes.ones:
        raise RequestError(f"{changes.label} changes nothing in its base, so there is nothing to export.")
    class_name, skeleton = _build(changes.base)
    finder = _Finder(changes, skeleton)
    layers, whole = finder.find()
    rank = best_rank([layer.sizes for layer in layers])
    for layer in layers:
        if not layer.sizes.fits(rank):
            whole[layer.module] = SMALLER
    finder.add_alike(whole)
    modules = [finder.whole(module, why) for module, why in sorted(whole.items())]
    if finder.problems:
        listed = "\n".join(f"  - {problem}" for problem in finder.problems)
        raise RequestError(f"{changes.label} cannot be a PEFT adapter:\n{listed}")
    sparse = [layer for layer in layers if layer.module not in whole]
    layout = AdapterLayout(skeleton, changes.base, class_name, rank if sparse else 0, tuple(sparse), tuple(modules))
    _check_places(layout)
    return layout


def _build(base: Checkpoint) -> tuple[str, Skeleton]:
    import transformers

    if not base.config:
        raise CheckpointError(
            f"{base.label} has no {CONFIG}, so its model cannot be built. Use a base with its config."
        )
    refuse_custom_code(base, "PEFT")
    named = architecture(base.config)
    name = named if hasattr(getattr(transformers, named, None), "_from_config") else "AutoModel"
    try:
        skeleton = Skeleton(base, name)
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{name} cannot build the model of {base.label} ({short(error)}).") from error
    return type(skeleton.model).__name__, skeleton


class _Finder:
    """From changed tensors to modules. problems: what cannot be expressed."""

    def __init__(self, changes: Changed, skeleton: Skeleton) -> None:
        self._changes, self._skeleton = changes, skeleton
        self._modules = dict(skeleton.model.named_modules())
        self.problems: list[str] = []

    def find(self) -> tuple[list[SparseLayer], dict[str, str]]:
        """Layers that have a sparse form; other modules, and why they have none."""
        changed = self._changed_parameters()
        layers: list[SparseLayer] = []
        whole: dict[str, str] = {}
        for path, module in self._modules.items():
            own = {local: self._skeleton.owners[path][local] for local, _ in module.named_parameters(recurse=False)}
            touched = [local for local, parameter in own.items() if parameter in changed]
            if not touched:
                continue
            if type(module) is not nn.Linear:
                whole[path] = f"of type {type(module).__name__}"
            elif touched != ["weight"]:
                whole[path] = BIASED
            elif not (group := changed[own["weight"]]).direct:
                whole[path] = "made of several tensors"
            else:
                layers.append(self._layer(path, module, group.disk[0], own))
        return layers, whole

    def _changed_parameters(self) -> dict[str, Group]:
        """Canonical name -> what it is made of."""
        ones = self._changes.ones
        by_name = {name: group for groups in self._skeleton.groups.values() for group in groups for name in group.disk}
        if lost := [name for name in ones if name not in by_name]:
            self.problems.append(
                f"{some(lost)}: no parameter of {type(self._skeleton.model).__name__}, the model that transformers "
                f"builds from {self._changes.base.label}; leave it out with --exclude and {self._again}"
            )
        groups = {by_name[name] for name in ones if name in by_name}
        return {parameter: group for group in groups for parameter in group.parameters}

    @property
    def _again(self) -> str:
        return "merge again" if self._changes.kind == "merge" else "localize again"

    def _layer(self, path: str, module: nn.Linear, tensor: str, own: Mapping[str, str]) -> SparseLayer:
        dtype = ITEM_BYTES[self._changes.base.info(tensor).dtype]
        nbytes = dtype * sum(self._skeleton.shapes[parameter].numel() for parameter in own.values())
        rows, columns = module.weight.shape
        return SparseLayer(path, tensor, Linear(rows, columns, self._changes.ones[tensor], nbytes))

    def add_alike(self, whole: dict[str, str]) -> None:
        """Modules that PEFT takes for one of those: their names end alike."""
        fresh = list(whole)
        while fresh:
            ending = fresh.pop()
            for path in self._modules:
                if path.endswith(ending) and path not in whole:
                    whole[path] = f"that PEFT takes for {ending}, as their names end alike"
                    fresh.append(path)

    def whole(self, path: str, why: str) -> WholeModule:
        """Notes a problem if the module cannot be stored as it is."""
        module, owners = self._modules[path], self._skeleton.owners[path]
        if fault := self._fault(module, owners):
            self.problems.append(
                f"{path} ({type(module).__name__}) has no sparse form, nor can PEFT store it whole: {fault}; leave its "
                f"tensors out with --exclude and {self._again}"
            )
        return WholeModule(path, why, owners)

    def _fault(self, module: nn.Module, owners: Mapping[str, str]) -> str | None:
        if own := [name for name in owners if "." in name]:
            return f"it holds other modules ({some(own)})"
        if buffers := sorted(module.state_dict().keys() - owners.keys()):
            return f"it holds {some(buffers)}, which {'is' if len(buffers) == 1 else 'are'} not trained"
        if absent := [name for name, parameter in owners.items() if parameter not in self._skeleton.groups]:
            return f"the base has no {some(absent)} for it"
        return None


def _check_places(layout: AdapterLayout) -> None:
    """Let PEFT make room for the adapter in the model. Raises RequestError unless it is where its tensors belong."""
    due = {spec.name: spec.shape for spec in layout.specs}
    try:
        places = dict(_places(layout))
    except Exception as error:  # PEFT's own checks, of every type
        raise RequestError(
            f"PEFT cannot put such an adapter into {layout.base.label} ({short(error)}). Use the merge or stitch "
            "command instead: a whole model needs no adapter."
        ) from error
    places |= {name: due.get(name, ()) for name in places if name.endswith(".shira_indices")}
    if unlike := sorted(name for name in places.keys() | due.keys() if places.get(name) != due.get(name)):
        raise RequestError(
            f"PEFT would not find the place of {some(unlike)} in {layout.base.label}: names of its modules are too "
            "much alike. Use the merge or stitch command instead: a whole model needs no adapter."
        )


def _places(layout: AdapterLayout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that PEFT would look for."""
    import warnings

    from peft import PeftConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PeftConfig.from_peft_type(**layout.config())
        model = inject_adapter_in_model(config, copy.deepcopy(layout.skeleton.model), low_cpu_mem_usage=True)
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for local, value in module.modules_to_save["default"].state_dict().items():
                yield f"{PREFIX}{path}.{local}", tuple(value.shape)
        elif isinstance(module, BaseTunerLayer):
            layer: Any = module
            yield f"{PREFIX}{path}.shira_weight", tuple(layer.shira_weight["default"].shape)
            yield f"{PREFIX}{path}.shira_indices", ()

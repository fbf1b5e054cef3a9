"""A model built by transformers with an adapter put in by PEFT, over weights that are read a layer at a time.

The base's parameters are placeholders of one NaN: see placeholders.py. Only if PEFT looks at their values while it
builds its layers, as for PiSSA, the model is built once more with the base's real weights.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_locstitch.adapters.placeholders import Watch, holds_nan, placeholder
from hf_locstitch.adapters.settings import short
from hf_locstitch.checkpoints.adapter import ADAPTER_WEIGHTS, AdapterCheckpoint
from hf_locstitch.checkpoints.checkpoint import CONFIG, Checkpoint
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.allocator import freed_memory_goes_back
from hf_locstitch.runtime.human import more
from hf_locstitch.tasks.empty_model import attach_conversions, empty_model
from hf_locstitch.tasks.loading import load_config
from hf_locstitch.tasks.parameter_names import Group, from_disk, group_names, to_disk

PREFIX = "base_model.model."  # of the names in adapter files
NO_MODEL = "An adapter needs a base that transformers can build without code from the repo; merge it into its base."

_BUILDING = threading.Lock()  # random numbers and warnings are the process's

_MAKING = threading.Lock()
_SKELETONS: dict[tuple[str, str], Any] = {}  # the last one made

Read = Callable[[str], Tensor]  # a tensor of the base by its name on disk, [*shape]


class Skeleton:
    """The model without weights or adapter. owners: module -> its own parameters' names -> canonical names."""

    def __init__(self, base: Checkpoint, auto_class: str) -> None:
        self.label = base.label
        self._make = lambda: empty_model(
            auto_class, load_config(base.source.fetch(CONFIG).parent, base.label, NO_MODEL), NO_MODEL
        )
        self.model = self._make()
        attach_conversions(self.model, list(base.tensors), base.shapes)
        self.groups: dict[str, list[Group]] = {}
        for group in group_names(self.model, list(base.tensors)):
            for parameter in group.parameters:
                self.groups.setdefault(parameter, []).append(group)
        canonical = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.owners = {
            path: {local: canonical[id(p)] for local, p in module.named_parameters(remove_duplicate=False)}
            for path, module in self.model.named_modules()
        }
        self.shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        times = Counter(self.owners[""].values())
        self.tied = frozenset(name for name, count in times.items() if count > 1)

    def sharing(self, parameter: str) -> list[str]:
        """The modules that have a parameter as their own, by their last names."""
        owners = [
            (path, local) for path, own in self.owners.items() for local, name in own.items() if name == parameter
        ]
        return [path.rpartition(".")[2] for path, local in owners if "." not in local]

    def filled(self, value: Callable[[str, torch.Size], Tensor]) -> Any:
        """The model with these values: canonical name, shape -> [*shape]."""
        model = self._make()
        canonical = {id(parameter): name for name, parameter in model.named_parameters()}
        made: dict[str, nn.Parameter] = {}
        for module in model.modules():
            for local, parameter in module._parameters.items():
                if parameter is not None:
                    name = canonical[id(parameter)]
                    if name not in made:
                        made[name] = nn.Parameter(value(name, parameter.shape), requires_grad=False)
                    module._parameters[local] = made[name]
        return model

    def read(self, parameter: str, read: Read) -> Tensor | None:
        """A parameter's value in the base, float32; None if the base lacks it."""
        if parameter not in self.groups:
            return None
        return from_disk(self.model, self.groups[parameter][0], read)[parameter]


def skeleton_of(base: Checkpoint, auto_class: str) -> Skeleton:
    """The same one for all adapters over a base; it takes little memory."""
    key = base.source.identity, auto_class
    with _MAKING:
        if key not in _SKELETONS:
            _SKELETONS.clear()
            with freed_memory_goes_back():
                _SKELETONS[key] = Skeleton(base, auto_class)
        return _SKELETONS[key]


@dataclass(frozen=True)
class Layer:
    """What is computed together. modules: paths of those that PEFT changes. groups: the tensors that they form."""

    modules: tuple[str, ...]
    groups: tuple[Group, ...]

    @property
    def disk(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group.disk)


class AdaptedModel:
    """weights: of the adapter's file. read: tensors of the base; None if there are only headers, and no values to get.

    layers: what the adapter changes. left: what of it the base has no tensor for, in words.
    Raises CheckpointError if the adapter does not fit the base.
    """

    def __init__(
        self,
        adapter: AdapterCheckpoint,
        skeleton: Skeleton,
        config: Any,
        weights: Mapping[str, Tensor],
        read: Read | None,
    ) -> None:
        self._adapter, self._skeleton, self._config, self._read = adapter, skeleton, config, read
        self._weights = dict(weights)
        self.real = False  # whether the layers hold the base's real weights
        with freed_memory_goes_back():
            if read is None:
                self._build_blank()
            elif not self._builds_on_placeholders():
                self.real = True
                self._build(self._value)
        del self._weights  # they are in the layers now
        self.layers = self._find_layers()

    def _build_blank(self) -> None:
        """Where there are no values: on zeros that take no memory, unless PEFT writes into them, as for OLoRA."""
        try:
            self._build(lambda name, shape: torch.zeros(()).expand(shape))
        except CheckpointError:
            self._build(lambda name, shape: torch.zeros(shape))

    def _builds_on_placeholders(self) -> bool:
        """Whether PEFT built its layers without looking at the base's weights."""
        watch = Watch()
        try:
            self._build(lambda name, shape: placeholder(shape), watch)
        except CheckpointError:  # such as a decomposition of NaN; what remains is raised with real weights
            return False
        base = {i: parameter for parameter in self._tuned.parameters() if (i := id(parameter)) in self._placeholders}
        replaced = any(parameter.data_ptr() != self._placeholders[i] for i, parameter in base.items())
        return not (watch.decided or replaced or holds_nan(self._tuned, base))

    def _value(self, name: str, shape: torch.Size) -> Tensor:
        assert self._read is not None
        found = self._skeleton.read(name, self._read)
        return torch.zeros(()).expand(shape) if found is None else found

    def _build(
        self, value: Callable[[str, torch.Size], Tensor], watch: AbstractContextManager[Any] | None = None
    ) -> None:
        from peft import get_peft_model, set_peft_model_state_dict

        self.left: list[str] = []
        direct: dict[str, str] = {}  # key in the file -> the base's own parameter that it replaces
        try:
            with _undisturbed():
                model = self._skeleton.filled(value)
                names = {id(parameter): name for name, parameter in model.named_parameters()}
                with watch or nullcontext():
                    self._tuned = get_peft_model(model, copy.deepcopy(self._config))
                weights = self._fitting(names, direct)
                if self._read is None:
                    weights |= self._whole_numbers(weights)
                result = set_peft_model_state_dict(self._tuned, weights)
        except CheckpointError:
            raise
        except Exception as error:  # PEFT's own checks of a stranger's config and weights, of every type
            raise CheckpointError(
                f"PEFT cannot put the {self._adapter.kind} adapter {self._adapter.label} into "
                f"{self._skeleton.label} ({short(error)}). Use the base that it was trained on."
            ) from error
        self._check_loaded(result)
        self._tuned.eval().requires_grad_(False)
        parameters = {id(p): p for p in self._tuned.parameters()}
        self.loose = {names[i]: p.data for i, p in parameters.items() if names.get(i) in direct.values()}
        self._placeholders = {
            i: p.data_ptr() for i, p in parameters.items() if i in names and names[i] not in self.loose
        }
        self._canonical = names
        self.modules = _outermost(self._tuned.base_model.model)

    def _fitting(self, names: Mapping[int, str], direct: dict[str, str]) -> dict[str, Tensor]:
        """The weights without what the base has in another size or not at all, with room for what replaces its own."""
        weights = dict(self._weights)
        for name, parameter in self._tuned.named_parameters():
            if id(parameter) in names and name in weights:
                if weights[name].shape == parameter.shape:
                    direct[name] = names[id(parameter)]
                    parameter.data = torch.empty(parameter.shape)
                else:
                    self._leave(names[id(parameter)], weights.pop(name), parameter)
        for path, module in self._wrappers():
            for local, parameter in module.original_module.named_parameters():
                key = f"{PREFIX}{path}.{local}"
                if key in weights and weights[key].shape != parameter.shape:
                    self._leave(f"{path}.{local}", weights[key], parameter)
                    weights[key] = torch.zeros(()).expand(parameter.shape)
        return weights

    def _whole_numbers(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Indices and sizes as PEFT starts with them, where only headers are at hand: zeros would be no such thing."""
        from peft import get_peft_model_state_dict

        own = get_peft_model_state_dict(self._tuned, save_embedding_layers=False)
        whole = {name: value for name, value in own.items() if not value.is_floating_point()}
        return {name: value for name, value in whole.items() if name in weights and weights[name].shape == value.shape}

    def _leave(self, name: str, found: Tensor, base: Tensor) -> None:
        self.left.append(f"{name} {list(found.shape)} (base {list(base.shape)})")

    def _wrappers(self) -> Iterator[tuple[str, Any]]:
        from peft.utils.other import ModulesToSaveWrapper

        for path, module in self._tuned.base_model.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                yield path, module

    def _check_loaded(self, result: Any) -> None:
        """Raises CheckpointError unless every tensor of the adapter found its place, and every place its tensor."""
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(self._config.peft_type, "")
        lost = [name for name in result.unexpected_keys if prefix and prefix in name]
        lacking = _not_shared([name for name in result.missing_keys if prefix and prefix in name])
        if lost or lacking:
            fault = f"has {lost[0]}, for which there is no place" if lost else f"lacks {lacking[0]}"
            raise CheckpointError(
                f"{self._adapter.label}/{ADAPTER_WEIGHTS} does not fit its config and {self._skeleton.label}: it "
                f"{fault}{more(len(lost or lacking))}. Use the base that the adapter was trained on."
            )
        self.left += [f"{name.removeprefix(PREFIX)} (not in the base)" for name in result.unexpected_keys]

    def _find_layers(self) -> list[Layer]:
        """What the adapter changes, in the order of the model: modules that form a tensor together are one layer."""
        by_parameter: dict[str, list[str]] = {}
        for path in self.modules:
            for name in dict.fromkeys(self._skeleton.owners[path].values()):
                by_parameter.setdefault(name, []).append(path)
        for name in self.loose:
            by_parameter.setdefault(name, [])
        layers: list[Layer] = []
        for name, paths in by_parameter.items():
            groups = self._skeleton.groups.get(name)
            if groups is None:
                self.left.append(f"{name} (not in the base)")
            elif name in self._skeleton.tied and self._splits_a_tie(name, paths):
                sharing = " and ".join(self._skeleton.sharing(name))
                self.left.append(f"{name} ({sharing} share it in the base, but the adapter has it trained apart)")
            else:
                layers.append(Layer(self._in_turn(paths), tuple(groups)))
        return _joined(layers)

    def _splits_a_tie(self, name: str, paths: Sequence[str]) -> bool:
        """Whether modules that share a parameter would each have its own afterwards."""
        from peft.utils.other import ModulesToSaveWrapper

        saved = [path for path in paths if isinstance(self.modules[path], ModulesToSaveWrapper)]
        if not saved:
            return False  # all is merged into the one that they share
        own = {
            id(parameter)
            for path in saved
            for local, parameter in self.modules[path].modules_to_save["default"].named_parameters()
            if self._skeleton.owners[path][local] == name
        }
        return len(saved) < len(self._skeleton.sharing(name)) or len(own) > 1

    def _in_turn(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Those of the modules with one parameter that are merged into it, one after the other: where they hold the
        same values, the first."""
        from peft.utils.other import AuxiliaryTrainingWrapper

        same = all(isinstance(self.modules[path], AuxiliaryTrainingWrapper) for path in paths)
        return tuple(paths[:1] if same else paths)

    def sizes(self, path: str) -> dict[str, torch.Size]:
        """The shapes of a module's parameters, by canonical name."""
        return {name: self._skeleton.shapes[name] for name in self._skeleton.owners[path].values()}

    def compute(self, layer: Layer) -> dict[str, Tensor]:
        """The finetuned values of a layer's tensors: name on disk -> float32 [*shape], float64 where the base is."""
        assert self._read is not None
        values: dict[str, Tensor] = {}
        for group in layer.groups:
            values |= from_disk(self._skeleton.model, group, self._read)
        values |= {name: value for name, value in self.loose.items() if name in values}
        merged: dict[str, Tensor] = {}
        for path in layer.modules:
            given = merged if self.real else values  # real weights are in the layers, but for what others have merged
            merged |= {name: new for name, new in self.merge(path, given).items() if name in values}
            values |= merged
        return {name: new for group in layer.groups for name, new in self._to_disk(group, values).items()}

    def _to_disk(self, group: Group, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self._read is not None
        made = to_disk(self._skeleton.model, group, {name: values[name] for name in group.parameters})
        for name in made:
            if self._adapter.info(name).dtype == "F64":
                base = self._read(name)
                made[name] = base + (made[name] - base.float()).double()
        return made

    @torch.no_grad()
    def merge(self, path: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A module's parameters with the adapter merged, by canonical name.

        values: those of the base, float32; they may be overwritten.
        """
        module, memo = self.modules[path], {}
        for parameter in module.parameters():
            name = self._canonical.get(id(parameter), "")
            if name in values:
                memo[id(parameter)] = nn.Parameter(values[name], requires_grad=False)
        merged = _merged(copy.deepcopy(module, memo))
        owned = self._skeleton.owners[path]
        return {owned[local]: p.data for local, p in merged.named_parameters(remove_duplicate=False)}


def _not_shared(names: Sequence[str]) -> list[str]:
    """Without what layers share and a file holds once, as PEFT itself leaves out."""
    shared = ("vblora_vector_bank", ".tinylora_v.", ".unilora_theta_d.")
    return [name for name in names if not any(one in name for one in shared)]


def _outermost(model: Any) -> dict[str, Any]:
    """The outermost modules that PEFT put in, by the path of what they stand for in the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    last = "."
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not path.startswith(last):
            found[path] = module
            last = f"{path}."  # what is inside comes next
    return found


def _merged(module: Any) -> Any:
    """The module that a copied layer of PEFT becomes, as merge_and_unload has it."""
    if hasattr(module, "unload_and_optionally_merge_module"):
        return module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    module.merge()
    return module.get_base_layer()


def _joined(layers: Sequence[Layer]) -> list[Layer]:
    """Layers that have a module or a tensor in common as one."""
    joined: list[Layer] = []
    for layer in layers:
        same = [one for one in joined if {*one.modules} & {*layer.modules} or {*one.groups} & {*layer.groups}]
        modules = [path for one in (*same, layer) for path in one.modules]
        groups = [group for one in (*same, layer) for group in one.groups]
        joined = [one for one in joined if one not in same]
        joined.append(Layer(tuple(dict.fromkeys(modules)), tuple(dict.fromkeys(groups))))
    return joined


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random numbers as always, which layers draw before they are loaded; the caller's stay; no advice is printed."""
    with _BUILDING, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield

"""One finetune over its base, as transformers loads them, ready for forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from hf_locstitch.checkpoints.tensors import pieces
from hf_locstitch.errors import RequestError
from hf_locstitch.localize.updates import interpolate
from hf_locstitch.tasks.loaded_model import LoadedModel, LoadedParameter, is_shared_out, own_rows
from hf_locstitch.tasks.parameter_names import check, chosen_groups, group_names

OnDisk = Callable[[str], Tensor]


@dataclass(frozen=True)
class MaskedParameter(LoadedParameter):
    """A localized parameter. base, finetuned: its values, on the CPU, views of the mapped files where possible;
    nothing writes to them."""

    base: Tensor
    finetuned: Tensor

    def task_vector_pieces(self, device: torch.device) -> Iterator[Tensor]:
        """finetuned − base of this process's part, in float32 (float64 if stored so), in the order of `pieces`."""
        wide = torch.promote_types(self.base.dtype, torch.float32)
        for finetuned, base in zip(pieces(self.part(self.finetuned)), pieces(self.part(self.base)), strict=True):
            yield finetuned.to(device, wide) - base.to(device, wide)

    def graft(self, share: Iterable[Tensor] | float) -> None:
        """Set the parameter to base + share·τ, always from the untouched base.

        share: of this process's part, in the order of `pieces`, on the parameter's device; or one number for all.
        """
        values = own_rows(self.parameter).detach()
        mapped = values.data_ptr() == self.base.data_ptr()  # still a view of the file, which must not be written to
        if not is_shared_out(self.parameter) and (mapped or not values.is_contiguous()):
            values = self.parameter.data = torch.empty_like(values, memory_format=torch.contiguous_format)
        shares = repeat(share) if isinstance(share, float | int) else share
        flat = (pieces(values), pieces(self.part(self.base)), pieces(self.part(self.finetuned)))
        for piece, base, finetuned, part in zip(*flat, shares, strict=False):
            piece.copy_(interpolate(base.to(self.device), finetuned.to(self.device), part))


class GraftedModel(LoadedModel[MaskedParameter]):
    """Its model has the base's weights where the base has them, else the finetune's (a head that only it has).
    Parameters are sorted by name."""

    @property
    def size(self) -> int:
        """The number of localized elements, over all processes."""
        return sum(masked.base.numel() for masked in self.parameters.values())


def make_grafted_model(
    finetuned: Any,
    base: Any,
    absent: Collection[str],
    names: Collection[str],
    localized: Collection[str],
    on_disk: OnDisk,
    device: torch.device,
    where: str,
    sharded: bool = False,
) -> GraftedModel:
    """Prepare the finetuned model for passes; the base model is not needed afterwards.

    absent: parameters that the base lacks. names: of the finetune's tensors on disk, some of which are `localized`.
    on_disk: reads such a tensor, [*shape]. sharded: shard the parameters over the processes.
    Raises MismatchError or RequestError if parameters and tensors on disk do not correspond.
    """
    groups = chosen_groups(group_names(finetuned, names), localized, where)
    originals = dict(base.named_parameters())
    wanted = {name for group in groups for name in group.parameters}
    if missing := sorted(wanted & set(absent)):
        raise RequestError(f"{missing[0]} of {where} is not in the base. Exclude it with --exclude.")
    values = {name: parameter.data for name, parameter in finetuned.named_parameters() if name in wanted}
    check(finetuned, groups, values, on_disk)
    for name, parameter in finetuned.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name not in absent and name in originals and originals[name].shape == parameter.shape:
            parameter.data = originals[name].data
    state = dict(base.named_buffers())
    for name, buffer in finetuned.named_buffers():
        if name not in absent and name in state and state[name].shape == buffer.shape:
            buffer.data = state[name].data
    dtype = next((originals[name].dtype for name in sorted(wanted)), torch.float32)
    finetuned.to(dtype=dtype)
    if sharded:
        share_out(finetuned, device)
    else:
        finetuned.to(device=device)
    parameters = dict(finetuned.named_parameters())
    chosen = {
        name: MaskedParameter(name, parameters[name], originals[name].data, values[name]) for name in sorted(wanted)
    }
    return GraftedModel(finetuned, chosen, tuple(groups))


def share_out(model: Any, device: torch.device) -> None:
    """FSDP2: each process keeps some rows of every parameter; a layer is gathered only while it runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def keep_no_activations(model: Any) -> None:
    """Activation checkpointing in a model that stays in evaluation mode: only its layers are in training mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not getattr(model, "supports_gradient_checkpointing", False):
        raise RequestError(
            f"{type(model).__name__} does not support activation checkpointing. "
            "Remove `checkpointing` from the localizer's settings."
        )
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            for name in ("dropout", "activation_dropout", "attention_dropout", "hidden_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)

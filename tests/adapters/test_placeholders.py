"""Layers that PEFT makes from the base's weights get the real ones; for all others a placeholder is enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.adapters import config_of, merged_by_peft, on_disk, save_adapter, save_base, save_lora
from helpers.models import load
from safetensors.torch import load_file

from hf_locstitch.adapters.adapted_model import AdaptedModel, Skeleton
from hf_locstitch.adapters.fit import lay_over
from hf_locstitch.adapters.placeholders import Watch, holds_nan, placeholder
from hf_locstitch.adapters.settings import peft_config
from hf_locstitch.checkpoints.adapter import AdapterCheckpoint
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import Ref


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


def adapted(base: Path, folder: Path) -> tuple[AdaptedModel, dict[str, torch.Tensor]]:
    """The model, and the finetuned values of the tensors that the adapter changes."""
    adapter, checkpoint = open_checkpoint(Ref(folder=folder)), open_checkpoint(Ref(folder=base))
    assert isinstance(adapter, AdapterCheckpoint)
    laid, skeleton = lay_over(adapter, checkpoint), Skeleton(checkpoint, "LlamaForCausalLM")
    weights = load_file(folder / "adapter_model.safetensors")
    model = AdaptedModel(laid, skeleton, peft_config(laid), weights, load(base).__getitem__)
    return model, {name: value for layer in model.layers for name, value in model.compute(layer).items()}


@pytest.mark.parametrize("kind", ["LORA", "VERA", "OFT", "FOURIERFT", "TRAINABLE_TOKENS"])
def test_most_kinds_do_not_look_at_the_base(kind: str, base: Path, tmp_path: Path) -> None:
    assert not adapted(base, save_adapter(tmp_path / "adapter", base, config_of(kind)))[0].real


def test_dora_looks_at_the_base_and_is_filled_from_its_file(base: Path, tmp_path: Path) -> None:
    assert not adapted(base, save_lora(tmp_path / "adapter", base, use_dora=True))[0].real


def pissa(folder: Path, base: Path) -> Path:
    """Its layers subtract from the base what they start with."""
    return save_lora(folder, base, init_lora_weights="pissa")


def frod(folder: Path, base: Path) -> Path:
    """It compares what it computes of the base, and no NaN remains."""
    return save_adapter(folder, base, config_of("FROD"))


@pytest.mark.parametrize("make", [pissa, frod])
def test_garbage_if_nobody_watched(
    make: Callable[[Path, Path], Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real weights these adapters are merged as PEFT does it; with others, what comes out is finite, too."""
    adapter = make(tmp_path / "adapter", base)
    due = on_disk(merged_by_peft(base, adapter), tmp_path / "due")
    model, values = adapted(base, adapter)
    assert model.real and all(torch.equal(value, due[name]) for name, value in values.items())
    monkeypatch.setattr(AdaptedModel, "_builds_on_placeholders", lambda self: self._build(self._other) or True)
    monkeypatch.setattr(AdaptedModel, "_other", lambda self, name, shape: torch.ones(shape), raising=False)
    _, values = adapted(base, adapter)
    assert all(value.isfinite().all() for value in values.values())
    assert not all(torch.equal(value, due[name]) for name, value in values.items())


@pytest.mark.parametrize(
    "look",
    [
        lambda weight: weight > 0,
        lambda weight: weight.norm().item(),
        lambda weight: weight.flatten().topk(2),
        lambda weight: weight.numpy(),
        lambda weight: weight.t().argmax(),
        lambda weight: torch.isfinite(weight * 2),
    ],
)
def test_what_numbers_decide_is_noticed(look: Callable[[torch.Tensor], object]) -> None:
    with Watch() as watch:
        look(placeholder((3, 4)))
    assert watch.decided
    with Watch() as watch:
        look(torch.ones(3, 4))
        placeholder((3, 4)).norm(dim=0) + placeholder((3, 4)).shape[1]
    assert not watch.decided


def test_nan_is_found_wherever_a_module_keeps_it() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    assert not holds_nan(module, ())
    nan = placeholder((2,))
    for keep in (
        lambda: module[0].register_buffer("hidden", nan, persistent=False),
        lambda: setattr(module[1], "plain", nan),
        lambda: setattr(module[0], "by_name", {"default": nan}),
    ):
        keep()
        assert holds_nan(module, ())
        assert not holds_nan(module, {id(nan)})
        for one, name in ((module[0], "hidden"), (module[1], "plain"), (module[0], "by_name")):
            if hasattr(one, name):
                delattr(one, name)


def test_a_placeholder_takes_no_memory() -> None:
    assert placeholder((1 << 20, 1 << 20)).untyped_storage().nbytes() == 4

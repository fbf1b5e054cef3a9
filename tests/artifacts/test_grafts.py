"""Skills put into a loaded model and taken out again: the bytes of a merge of what is in it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers.families import build, finetunes, pair
from helpers.models import load, same_bits
from helpers.runs import quick_localize, quick_stitch
from safetensors.torch import save_file

from hf_locstitch import LocalizedCheckpoint, RequestError, load_localized
from hf_locstitch.artifacts import grafts
from hf_locstitch.artifacts.graft_target import put
from hf_locstitch.errors import MismatchError


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: values.detach().clone() for name, values in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("kind", "dtype"), [
    ("llama", torch.bfloat16), ("llama", torch.float32), ("gpt2", torch.float32), ("mixtral", torch.bfloat16),
    ("qwen3-moe", torch.float32), ("mixtral", torch.float64), ("deepseek-v3", torch.float32),
])  # fmt: skip
def test_at_every_moment_the_merge_of_what_is_in_it(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, *tuned = finetunes(tmp_path, kind, dtype, count=3)
    for number, folder in enumerate(tuned):
        quick_localize(base, folder, out=tmp_path / f"l{number}", localizer={"density": 0.3})
    due: dict[frozenset[int], dict[str, torch.Tensor]] = {frozenset(): weights(loaded(base, dtype))}
    for chosen in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        out = tmp_path / f"out{chosen}"
        quick_stitch(base, [tmp_path / f"l{number}" for number in chosen], out=out)
        due[frozenset(chosen)] = weights(loaded(out, dtype))
    skills = [load_localized(tmp_path / f"l{number}") for number in range(3)]
    model, inside = loaded(base, dtype), set[int]()
    for coming, going in zip(list(permutations(range(3)))[::2], list(permutations(range(3)))[1::2], strict=True):
        for number in coming:
            skills[number].apply(model)
            inside.add(number)
            assert same(weights(model), due[frozenset(inside)])
        for number in going:
            skills[number].remove(model)
            inside.remove(number)
            assert same(weights(model), due[frozenset(inside)])
    assert not [key for key in model.state_dict() if "locstitch" in key]


def test_what_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    base, tuned = finetunes(tmp_path, count=1)
    quick_localize(base, tuned, out=tmp_path / "l")
    skill, model = load_localized(tmp_path / "l"), loaded(base, torch.float32)
    with pytest.raises(RequestError, match="is not in this model"):
        skill.remove(model)
    skill.apply(model)
    with pytest.raises(RequestError, match="already"):
        skill.apply(model)
    other = build("gpt2", torch.float32)
    before = weights(other)
    with pytest.raises(MismatchError, match="not a parameter of this GPT2LMHeadModel"):
        skill.apply(other)
    wide = build("llama", torch.float32)
    wide.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(49, 32))
    kept = weights(wide)
    with pytest.raises(MismatchError, match=r"up_proj.weight is \[48, 32\] in .* but \[49, 32\]"):
        skill.apply(wide)
    assert same(weights(other), before) and same(weights(wide), kept)


@dataclass(frozen=True)
class Skill:
    """A skill, and the weights of the base and of what the base becomes with it."""

    base: Path
    localized: Path
    due: dict[str, torch.Tensor]

    @property
    def start(self) -> dict[str, torch.Tensor]:
        return weights(self.model())

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        return loaded(self.base, dtype)

    def open(self) -> LocalizedCheckpoint:
        return load_localized(self.localized)


@pytest.fixture(scope="module")
def skill(tmp_path_factory: pytest.TempPathFactory) -> Skill:
    root = tmp_path_factory.mktemp("skill")
    base, tuned = finetunes(root, count=1)
    quick_localize(base, tuned, out=root / "l", localizer={"density": 0.3})
    quick_stitch(base, [root / "l"], out=root / "due")
    return Skill(base, root / "l", weights(loaded(root / "due", torch.float32)))


def set_weights(model: Any, change: Callable[[torch.Tensor], torch.Tensor], only: str) -> None:
    """Replace parameters by what `change` makes of them."""
    for name, parameter in list(model.named_parameters()):
        if only in name:
            owner, _, last = name.rpartition(".")
            made = change(parameter.detach())
            setattr(model.get_submodule(owner), last, torch.nn.Parameter(made, requires_grad=made.is_floating_point()))


def test_two_folders_of_one_name(tmp_path: Path) -> None:
    base, *tuned = finetunes(tmp_path, count=2)
    for number, folder in enumerate(tuned):
        (tmp_path / str(number)).mkdir()
        quick_localize(base, folder, out=tmp_path / str(number) / "skill", localizer={"density": 0.3})
    one, other = (load_localized(tmp_path / number / "skill") for number in "01")
    model, start = loaded(base, torch.float32), weights(loaded(base, torch.float32))
    one.apply(model)
    alone = weights(model)
    with pytest.raises(RequestError, match="is not in this model"):
        other.remove(model)
    other.apply(model)
    one.remove(model)
    other.remove(model)
    assert same(weights(model), start)
    shutil.copytree(tmp_path / "0" / "skill", tmp_path / "copy")
    one.apply(model)
    with pytest.raises(RequestError, match="copy is in this model already"):
        load_localized(tmp_path / "copy").apply(model)
    assert same(weights(model), alone)


def test_sums_have_the_order_of_a_stitch(tmp_path: Path) -> None:
    """In float64 it decides the last bit; the folders' names say nothing."""
    base, *tuned = finetunes(tmp_path, dtype=torch.float64, count=3)
    localized = [tmp_path / name / "skill" for name in "bca"]
    for folder, out in zip(tuned, localized, strict=True):
        out.parent.mkdir()
        quick_localize(base, folder, out=out, localizer={"density": 0.8})
    quick_stitch(base, localized, names=["x", "y", "z"], out=tmp_path / "due")
    due = weights(loaded(tmp_path / "due", torch.float64))
    for order in permutations(localized):
        model = loaded(base, torch.float64)
        for folder in order:
            load_localized(folder).apply(model)
        assert same(weights(model), due)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """Every other element of a wider one."""
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


@pytest.mark.parametrize("change", [transposed, spread])
def test_any_strides(skill: Skill, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model, one = skill.model(), skill.open()
    set_weights(model, change, "mlp")
    assert not model.model.layers[0].mlp.up_proj.weight.is_contiguous()
    one.apply(model)
    assert same(weights(model), skill.due)
    one.remove(model)
    assert same(weights(model), skill.start)


def test_channels_last(tmp_path: Path) -> None:
    base, tuned = finetunes(tmp_path, "vit", count=1)
    quick_localize(base, tuned, out=tmp_path / "l", include=["*"], localizer={"density": 0.3})
    quick_stitch(base, [tmp_path / "l"], out=tmp_path / "due")
    load_vit: Any = transformers.ViTForImageClassification.from_pretrained
    due, plain, model = (load_vit(tmp_path / name) for name in ("due", "base", "base"))
    model.to(memory_format=torch.channels_last)
    patches = model.vit.embeddings.patch_embeddings.projection.weight
    assert not patches.is_contiguous()
    one = load_localized(tmp_path / "l")
    one.apply(model)
    assert same(weights(model), weights(due)) and not patches.is_contiguous()
    one.remove(model)
    assert same(weights(model), weights(plain))


def test_negative_zeros_and_nan_come_and_go(tmp_path: Path) -> None:
    """Bit for bit, as in a stitch."""
    base, tuned = finetunes(tmp_path, count=1)
    name = "model.layers.0.mlp.up_proj.weight"
    state = load(tuned)
    state[name].view(-1)[:8] = -0.0
    save_file(state, tuned / "model.safetensors", metadata={"format": "pt"})
    quick_localize(base, tuned, out=tmp_path / "l", localizer={"density": 0.9})
    model = loaded(base, torch.float32)
    model.get_parameter(name).detach().view(-1)[0] = torch.nan
    before = model.get_parameter(name).detach().clone()
    one = load_localized(tmp_path / "l")
    one.apply(model)
    mask = one.mask(name)
    assert mask.view(-1)[:8].any() and mask.view(-1)[0]
    assert same_bits({name: model.get_parameter(name).detach()[mask]}, {name: state[name][mask]})
    one.remove(model)
    assert same_bits({name: model.get_parameter(name).detach()}, {name: before})


def test_an_expert_that_was_left_out_keeps_its_weights(tmp_path: Path) -> None:
    """Experts are one parameter in memory, and tensors of their own in the localized checkpoint."""
    base, tuned = finetunes(tmp_path, "mixtral", count=1)
    quick_localize(base, tuned, out=tmp_path / "l", exclude=["*experts.1.*"], localizer={"density": 0.5})
    quick_stitch(base, [tmp_path / "l"], out=tmp_path / "due")
    model = loaded(base, torch.float32)
    load_localized(tmp_path / "l").apply(model)
    assert same(weights(model), weights(loaded(tmp_path / "due", torch.float32)))


def test_a_model_that_was_built_of_its_config(tmp_path: Path) -> None:
    base, tuned = finetunes(tmp_path, "mixtral", count=1)
    quick_localize(base, tuned, out=tmp_path / "l", localizer={"density": 0.5})
    quick_stitch(base, [tmp_path / "l"], out=tmp_path / "due")
    start = loaded(base, torch.float32)
    model = type(start)(start.config)
    model.load_state_dict(start.state_dict())
    load_localized(tmp_path / "l").apply(model)
    assert same(weights(model), weights(loaded(tmp_path / "due", torch.float32)))


def test_what_fails_half_way_is_undone(skill: Skill, monkeypatch: pytest.MonkeyPatch) -> None:
    model, one = skill.model(), skill.open()
    left = 3

    def fail(parameter: torch.Tensor, at: torch.Tensor, values: torch.Tensor) -> None:
        nonlocal left
        left -= 1
        put(parameter, at, values)
        if left == 0:
            raise MemoryError

    monkeypatch.setattr(grafts, "put", fail)
    with pytest.raises(MemoryError):
        one.apply(model)
    assert left < 0 and same(weights(model), skill.start)
    one.apply(model)
    assert same(weights(model), skill.due)
    left = 3
    with pytest.raises(MemoryError):
        one.remove(model)
    assert left < 0 and same(weights(model), skill.due)
    one.remove(model)
    assert same(weights(model), skill.start)


class Wrapped(torch.Tensor):
    """As of a library for quantization."""


UNWRITABLE = {
    "offloaded": (lambda tensor: tensor.to("meta"), "down_proj.weight .* is on the meta device"),
    "quantized": (lambda tensor: tensor.to(torch.int8), r"is quantized \(torch.int8\)"),
    "four bits": (lambda tensor: tensor.to(torch.uint8).view(-1, 1), r"is quantized \(torch.uint8\)"),
    "FP8": (lambda tensor: tensor.to(torch.float8_e4m3fn), r"is quantized \(torch.float8_e4m3fn\)"),
    "wrapped": (lambda tensor: tensor.as_subclass(Wrapped), "is a Wrapped, not a plain tensor"),
    "overlapping": (lambda tensor: tensor[:1].expand(len(tensor), -1), "share memory"),
}


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_parameters_that_cannot_be_written_into(skill: Skill, kind: str) -> None:
    """The last ones of the model: whatever came before stays as it is, too."""
    change, said = UNWRITABLE[kind]
    model = skill.model()
    set_weights(model, change, "layers.1.mlp")
    before = {name: tensor for name, tensor in weights(model).items() if "layers.1.mlp" not in name}
    with pytest.raises(RequestError, match=said):
        skill.open().apply(model)
    assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in before.items())


def test_sharded_parameters(skill: Skill, tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = skill.model()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(RequestError, match="is a DTensor, sharded"):
            skill.open().apply(model)
        wrapped = torch.nn.parallel.DistributedDataParallel(skill.model())
        skill.open().apply(wrapped)
        assert same(weights(wrapped.module), skill.due)
    finally:
        distributed.destroy_process_group()


def test_inference_mode(skill: Skill) -> None:
    one = skill.open()
    with torch.inference_mode():
        model = copy.deepcopy(skill.model())
        assert all(parameter.is_inference() for parameter in model.parameters())
    with pytest.raises(RequestError, match="inference_mode"):
        one.apply(model)
    with torch.inference_mode():
        one.apply(model)
        assert same(weights(model), skill.due)
        one.remove(model)
        assert same(weights(model), skill.start)
    plain = skill.model()
    with torch.inference_mode():
        one.apply(plain)
    assert same(weights(plain), skill.due)
    one.remove(plain)
    assert same(weights(plain), skill.start)


def test_tied_weights(tmp_path: Path) -> None:
    """Embedding and head are one parameter, and on disk two tensors."""
    base, tuned = pair("llama-tied", tmp_path, torch.float32)
    for folder in (base, tuned):
        state = load(folder)
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    quick_localize(base, tuned, out=tmp_path / "same", include=["*"], localizer={"density": 1})
    model = loaded(base, torch.float32)
    load_localized(tmp_path / "same").apply(model)
    assert same(weights(model), weights(loaded(tuned, torch.float32)))
    state["lm_head.weight"] += 1
    save_file(state, tuned / "model.safetensors", metadata={"format": "pt"})
    quick_localize(base, tuned, out=tmp_path / "torn", include=["*"], localizer={"density": 1})
    model = loaded(base, torch.float32)
    with pytest.raises(MismatchError, match=r"lm_head.weight|embed_tokens.weight.*one parameter of this model"):
        load_localized(tmp_path / "torn").apply(model)
    assert same(weights(model), weights(loaded(base, torch.float32)))


def test_under_wrappers(skill: Skill) -> None:
    """torch.compile and data parallelism leave the parameters as they are."""
    model, one = skill.model(), skill.open()
    one.apply(torch.compile(model))
    assert same(weights(model), skill.due)
    one.remove(torch.nn.DataParallel(model))
    assert same(weights(model), skill.start)


def test_through_another_handle(skill: Skill) -> None:
    """What is in a model is known of the handle that it was applied through; no other changes the same weights."""
    model, alike, one = skill.model(), skill.model(), skill.open()
    for name, parameter in model.named_parameters():
        path, _, local = name.rpartition(".")
        alike.get_submodule(path)._parameters[local] = torch.nn.Parameter(parameter.data)
    for first, others in ((model, (model.model, alike)), (model.model, (model,)), (alike, (model, model.model))):
        kind = type(first).__name__
        one.apply(first)
        assert same(weights(model), skill.due)
        for other in others:
            with pytest.raises(RequestError, match=rf"of a {kind} with .* in it\. Apply .* to that model"):
                one.apply(other)
            with pytest.raises(RequestError, match=rf"applied to a {kind} that shares its weights: remove it there"):
                one.remove(other)
            assert same(weights(model), skill.due)
        one.remove(first)
        assert same(weights(model), skill.start)
    twin = copy.deepcopy(model)
    for copied in (model, twin):
        one.apply(copied)
        assert same(weights(copied), skill.due)


def compiled_in_part(model: Any) -> Any:
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


def wrapped_by_peft(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def with_adapter(model: Any) -> Any:
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    return model


@pytest.mark.parametrize(("wrap", "said"), [
    (wrapped_by_peft, "PEFT adapters .*base_layer"),
    (with_adapter, "PEFT adapters .*base_layer"),
    (compiled_in_part, "torch.compile around a part .*_orig_mod"),
])  # fmt: skip
def test_parameters_under_other_names(skill: Skill, wrap: Callable[[Any], Any], said: str) -> None:
    model, one = skill.model(), skill.open()
    one.apply(model)
    wrapped = wrap(model)
    for attempt in (one.apply, one.remove):
        with pytest.raises(RequestError, match=said):
            attempt(wrapped)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, skill.due["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize(("model", "said"), [
    (None, "not into None"), (torch.nn.Linear(2, 2), "not into a Linear"), ("base", "not into a str"),
])  # fmt: skip
def test_what_is_no_transformers_model(skill: Skill, model: Any, said: str) -> None:
    for attempt in (skill.open().apply, skill.open().remove):
        with pytest.raises(TypeError, match=f"a transformers model, as from_pretrained loads it, {said}"):
            attempt(model)


def test_weights_that_changed_meanwhile(skill: Skill) -> None:
    """What they would be without the skill is not known. Where no skill is, they are the model's own, and stay."""
    model, one = skill.model(), skill.open()
    one.apply(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    changed = weights(model)
    with pytest.raises(RequestError, match=r"has other values than it had once .*/l was in this model: it was trained"):
        one.remove(model)
    assert same(weights(model), changed)
    model = skill.model()
    one.apply(model)
    one.remove(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    changed = weights(model)
    one.apply(model)
    one.remove(model)
    assert same(weights(model), changed)


def test_converted_meanwhile(skill: Skill) -> None:
    model, one = skill.model(torch.bfloat16), skill.open()
    one.apply(model)
    model.float()
    one.remove(model)
    assert same(weights(model), weights(skill.model(torch.bfloat16).float()))


def test_other_shapes_in_stacks(tmp_path: Path) -> None:
    base, tuned = finetunes(tmp_path, "mixtral", count=1)
    quick_localize(base, tuned, out=tmp_path / "l")
    wide = build("mixtral", torch.float32)
    wide.model.layers[1].mlp.experts.down_proj = torch.nn.Parameter(torch.zeros(4, 32, 49))
    with pytest.raises(MismatchError, match=r"w2.weight is \[32, \d+\] in .*/l but \[32, 49\] in this Mixtral"):
        load_localized(tmp_path / "l").apply(wide)


def test_messages(skill: Skill) -> None:
    model, one = skill.model(), skill.open()
    with pytest.raises(RequestError, match=r"/l is not in this model, which has no localized checkpoint in it\."):
        one.remove(model)
    with pytest.raises(MismatchError) as caught:
        one.apply(build("gpt2", torch.float32))
    assert "--" not in str(caught.value) and "of this GPT2LMHeadModel" in str(caught.value)

"""Parameters in memory find their tensors on disk, whatever transformers made of them while loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.architectures import TEXT, blocks, save_family
from helpers.families import pair
from helpers.grafted import CASES, prepare
from helpers.models import load
from safetensors.torch import save_file

from hf_locstitch.errors import MismatchError, RequestError
from hf_locstitch.tasks.empty_model import attach_conversions, empty_model
from hf_locstitch.tasks.parameter_names import Group, check, chosen_groups, from_disk, group_names, to_disk


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "Qwen3MoeForCausalLM", "MixtralForCausalLM",
                                  "BertModel", "CLIPModel", "GPT2LMHeadModel", "LlamaForCausalLM-tied"])  # fmt: skip
def test_weights_come_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    import transformers

    folder = save_family(kind, tmp_path)[0]
    state = load(folder)
    model = getattr(transformers, kind.split("-")[0]).from_pretrained(folder)
    groups = group_names(model, state)
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    check(model, groups, weights, state.__getitem__)
    found = {name for group in groups for name in group.disk}
    assert set(blocks(state)) <= found
    mapped = {name for group in groups for name in to_disk(model, group, weights)}
    assert mapped == found
    if "Moe" in kind or "Mixtral" in kind:
        assert any(not group.direct and len(group.disk) > 1 for group in groups)


def test_a_wrong_mapping_is_noticed(tmp_path: Path) -> None:
    """Two experts that changed places on disk would get one another's gradients."""
    folders = pair("mixtral", tmp_path, torch.float32)
    state = load(folders[1])
    one, other = (f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight" for i in (0, 1))
    assert one in state and other in state
    grafted, _ = prepare("mixtral", folders)
    swapped = {**state, one: state[other], other: state[one]}
    weights = {name: masked.finetuned for name, masked in grafted.parameters.items()}
    check(grafted.model, grafted.groups, weights, state.__getitem__)
    with pytest.raises(RequestError, match="gradients could not be trusted"):
        check(grafted.model, grafted.groups, weights, swapped.__getitem__)


def test_one_expert_alone_cannot_be_localized(tmp_path: Path) -> None:
    folders = pair("mixtral", tmp_path, torch.float32)
    names = [name for name in blocks(load(folders[1])) if "experts.1.w1" not in name]
    with pytest.raises(MismatchError, match="both are one parameter in memory"):
        prepare("mixtral", folders, names)


def test_a_name_in_no_group() -> None:
    groups = [Group((("a", "a"),), ("a",), True)]
    with pytest.raises(MismatchError, match=r"b \(and 1 more\) is to be localized but is not a parameter"):
        chosen_groups(groups, ["a", "b", "c"], "ft")
    assert chosen_groups(groups, ["a"], "ft") == groups


def test_tied_weights_stored_twice_score_alike(tmp_path: Path) -> None:
    """Embedding and head, one parameter, on disk under both names: each gets the parameter's score."""
    folders = pair("llama-tied", tmp_path, torch.float32)
    for folder in folders:
        state = load(folder)
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    grafted, _ = prepare("tied", folders, names)
    assert list(grafted.parameters) == ["model.embed_tokens.weight"] and CASES["tied"][0] == "llama-tied"
    mapped = dict(grafted.to_disk(lambda masked: masked.finetuned - masked.base))
    assert mapped.keys() == set(names) and torch.equal(*mapped.values())


@pytest.mark.parametrize("turned", [True, False])
def test_stacks_that_may_lie_transposed_on_disk(turned: bool) -> None:
    """A Qwen3-VL-MoE's experts, as they were published, or as transformers saves them since."""
    import transformers

    text = {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    config = transformers.Qwen3VLMoeConfig(
        text_config=text, vision_config={"depth": 1, "deepstack_visual_indexes": [0]}
    )
    model = empty_model("Qwen3VLMoeForConditionalGeneration", config, "")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    stacks = [name for name in shapes if "experts" in name]
    if turned:
        shapes |= {name: (shapes[name][0], *shapes[name][:0:-1]) for name in stacks}
    attach_conversions(model, list(shapes), shapes)
    (group,) = (group for group in group_names(model, shapes) if group.disk == (stacks[0],))
    stored = torch.randn(shapes[stacks[0]])
    found = from_disk(model, group, lambda _: stored)
    assert torch.equal(found[stacks[0]], stored.transpose(1, 2) if turned else stored)
    assert torch.equal(to_disk(model, group, found)[stacks[0]], stored)

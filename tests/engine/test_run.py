"""The golden requirements of the method, end to end on folders, against an in-memory reference."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers.models import BLOCK_NAMES, SHAPES, State, finetune, load, random_state, same_bits, save, save_sharded
from helpers.reference import differs, reference_masks, reference_stitch
from helpers.runs import files_of, merge_folders, merged, quick_merge
from helpers.strategies import families
from hypothesis import given, settings

from hf_locstitch import Magnitude, load_mask, verify
from hf_locstitch.errors import NonFiniteError
from hf_locstitch.localize.bracket import FixedBracket
from hf_locstitch.runtime.settings import Settings

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
N = sum(torch.Size(SHAPES[name]).numel() for name in BLOCK_NAMES)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float64])
@pytest.mark.parametrize("density", ["0", "0.03", "0.1", "0.29", "0.5", "0.9", "1"])
def test_equals_the_reference(tmp_path: Path, density: str, dtype: torch.dtype, scope: str) -> None:
    base = random_state(0, dtype)
    finetuned = [finetune(base, seed) for seed in range(3)]
    out = merged(tmp_path, base, finetuned, localizer={"density": float(density), "scope": scope})
    masks = [reference_masks(base, state, BLOCK_NAMES, density, scope) for state in finetuned]
    assert same_bits(load(out), reference_stitch(base, finetuned, masks))
    for i, mask in enumerate(masks):
        found = load_mask(out / "masks" / f"ft{i}.safetensors")
        assert found.keys() == mask.keys() and all(torch.equal(found[name], mask[name]) for name in mask)


@settings(max_examples=60)
@given(family=families())
def test_ties_chunks_and_order_of_models(
    tmp_path_factory: pytest.TempPathFactory, family: tuple[State, list[State], str, int]
) -> None:
    base, finetuned, density, chunk = family
    tmp = tmp_path_factory.mktemp("family")
    names = list(base)
    out = merged(tmp, base, finetuned, Settings(chunk, workers=2), localizer={"density": float(density)})
    masks = [reference_masks(base, state, names, density) for state in finetuned]
    result = load(out)
    reference = reference_stitch(base, finetuned, masks)
    assert all(torch.equal(result[name], reference[name]) for name in reference)
    n = sum(tensor.numel() for tensor in base.values())
    k = int(density.replace(".", "").ljust(3, "0")) * n // 100 if "." in density else int(density) * n
    for i, state in enumerate(finetuned):
        mask = load_mask(out / "masks" / f"ft{i}.safetensors")
        changed = sum(int(differs(state[name], base[name]).sum()) for name in names)
        assert sum(int(part.sum()) for part in mask.values()) == min(k, changed)
        times = {name: sum(m[name].int() for m in masks) for name in names}
        for name in names:  # the finetuned bytes, −0.0 included, where this mask alone covers
            alone = mask[name] & (times[name] == 1)
            bits = torch.int32 if state[name].dtype == F32 else torch.int16
            assert torch.equal(result[name][alone].view(bits), state[name][alone].view(bits))
    entries = [{"ref": str(tmp / f"ft{i}"), "name": f"ft{i}"} for i in reversed(range(len(finetuned)))]
    again = merge_folders(tmp, entries, Settings(7, workers=1), localizer={"density": float(density)})
    assert same_bits(load(again), result)


def test_density_one_with_one_model_is_that_model_in_the_blocks(tmp_path: Path) -> None:
    base = random_state(0, BF16)
    base["model.layers.0.norm.weight"][:] = 0.0
    other = finetune(base, 1)
    other["model.layers.0.norm.weight"][:] = -0.0
    result = load(merged(tmp_path, base, [other], localizer={"density": 1.0}))
    assert same_bits({name: result[name] for name in BLOCK_NAMES}, {name: other[name] for name in BLOCK_NAMES})
    rest = [name for name in SHAPES if name not in BLOCK_NAMES]
    assert same_bits({name: result[name] for name in rest}, {name: base[name] for name in rest})


def test_float64_keeps_what_float32_cannot_tell(tmp_path: Path) -> None:
    base = {name: tensor.double() for name, tensor in random_state(0).items()}
    other = {name: tensor * (1 + 1e-12) for name, tensor in base.items()}
    result = load(merged(tmp_path, base, [other], localizer={"density": 1.0}, include=["*"]))
    assert same_bits(result, other)


def test_density_one_over_all_tensors_is_the_finetuned_file(tmp_path: Path) -> None:
    base = random_state(0, BF16)
    out = merged(tmp_path, base, [finetune(base, 1)], localizer={"density": 1.0}, include=["*"])
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "ft0" / "model.safetensors").read_bytes()


def test_density_zero_is_the_base_file(tmp_path: Path) -> None:
    base = random_state(0, BF16)
    out = merged(tmp_path, base, [finetune(base, 1), finetune(base, 2)], localizer={"density": 0.0})
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()


def test_unchanged_weights_are_in_no_mask(tmp_path: Path) -> None:
    """Fewer weights changed than the mask may keep: it holds those alone, and pulls nobody else's back to the base."""
    base = random_state(0)
    few = {name: tensor.clone() for name, tensor in base.items()}
    few["model.layers.1.norm.weight"] += 1.0
    all_moved = finetune(base, 1)
    out = merged(tmp_path, base, [few, all_moved], localizer={"density": 0.5})
    masks = [reference_masks(base, state, BLOCK_NAMES, "0.5") for state in (few, all_moved)]
    for i, mask in enumerate(masks):
        found = load_mask(out / "masks" / f"ft{i}.safetensors")
        assert all(torch.equal(found[name], mask[name]) for name in BLOCK_NAMES)
    assert sum(int(mask.sum()) for mask in masks[0].values()) == 6
    result = load(out)
    assert same_bits(result, reference_stitch(base, [few, all_moved], masks))
    for name in BLOCK_NAMES:
        alone = masks[1][name] & ~masks[0][name]
        assert torch.equal(result[name][alone], all_moved[name][alone])
    record = json.loads((out / "locstitch.json").read_text())
    assert record["k"] is None and [mask["ones"] for mask in record["masks"].values()] == [6, N // 2]
    (note,) = record["warnings"]
    assert note.startswith(f"the mask of ft0 keeps 6 of the {N // 2} elements asked for")
    assert note in (out / "README.md").read_text()
    assert verify(out, base=tmp_path / "base", finetuned=[tmp_path / "ft0", tmp_path / "ft1"], tensors="all").ok


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("bracket", [FixedBracket(0x7F000000, 0x7F000001), FixedBracket(1, 2), FixedBracket(0, 1)])
def test_a_wrong_bracket_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bracket: FixedBracket, scope: str
) -> None:
    """A sample that misjudges the model costs a second pass, not a coordinate."""
    base = random_state(0)
    others = [finetune(base, 1), finetune(base, 2)]
    how = {"density": 0.2, "scope": scope}
    expected = merged(tmp_path / "a", base, others, localizer=how)
    calls = []
    monkeypatch.setattr("hf_locstitch.localize.scan.SAMPLE", 4)
    monkeypatch.setattr("hf_locstitch.localize.scan.SMALLEST_SAMPLE", 4)
    monkeypatch.setattr("hf_locstitch.localize.scan.SAMPLE_RUN", 2)
    monkeypatch.setattr("hf_locstitch.localize.scan.sample_bracket", lambda *args: calls.append(args) or bracket)
    assert files_of(merged(tmp_path / "b", base, others, localizer=how)) == files_of(expected)
    assert calls


@pytest.mark.parametrize("count", [20, 4096])
def test_a_bound_from_a_sample_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    shapes = {f"layers.{i}.w": (50, 40) for i in range(8)}
    base = random_state(0, BF16, shapes)
    others = [finetune(base, seed, 1e-2) for seed in range(2)]
    expected = merged(tmp_path / "a", base, others, localizer={"density": 0.03})
    monkeypatch.setattr("hf_locstitch.localize.scan.SAMPLE", count)
    monkeypatch.setattr("hf_locstitch.localize.scan.SMALLEST_SAMPLE", count)
    monkeypatch.setattr("hf_locstitch.localize.scan.SAMPLE_RUN", 4)
    assert files_of(merged(tmp_path / "b", base, others, localizer={"density": 0.03})) == files_of(expected)


def test_shards_of_the_inputs_do_not_matter(tmp_path: Path) -> None:
    base = random_state(0, BF16)
    others = [finetune(base, seed) for seed in range(2)]
    expected = load(merged(tmp_path / "a", base, others))
    tmp = tmp_path / "b"
    save_sharded(tmp / "base", base, lambda names: [[name] for name in names])
    save_sharded(tmp / "ft0", others[0], lambda names: [names[::2], names[1::2]])
    save_sharded(tmp / "ft1", others[1], lambda names: [list(reversed(names))])
    out = merge_folders(tmp, [{"ref": str(tmp / "ft0"), "name": "ft0"}, {"ref": str(tmp / "ft1"), "name": "ft1"}])
    assert same_bits(load(out), expected)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(SHAPES)
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in base.values())
    assert index["metadata"]["total_size"] == 2 * index["metadata"]["total_parameters"]


def test_shard_size_of_the_output(tmp_path: Path) -> None:
    base = random_state(0)
    others = [finetune(base, 1)]
    expected = load(merged(tmp_path / "a", base, others))
    out = merged(tmp_path / "b", base, others, shard_size="500B")
    assert same_bits(load(out), expected)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 1 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"


def test_scale(tmp_path: Path) -> None:
    base = random_state(0)
    finetuned = [finetune(base, seed) for seed in range(3)]
    out = merged(tmp_path, base, finetuned, localizer={"density": 0.4}, scale=0.3)
    masks = [reference_masks(base, state, BLOCK_NAMES, "0.4") for state in finetuned]
    assert same_bits(load(out), reference_stitch(base, finetuned, masks, 0.3))


def test_other_dtypes_are_compared_in_float32_and_cast(tmp_path: Path) -> None:
    base = random_state(0, BF16)
    other = finetune({name: tensor.float() for name, tensor in base.items()}, 1)
    out = merged(tmp_path, base, [other], localizer={"density": 0.3})
    masks = [reference_masks(base, other, BLOCK_NAMES, "0.3")]
    assert same_bits(load(out), reference_stitch(base, [other], masks))
    assert "ft0 is F32 where the base is BF16" in (out / "README.md").read_text()


def test_output_dtype(tmp_path: Path) -> None:
    base = random_state(0, BF16)
    others = [finetune(base, 1)]
    expected = load(merged(tmp_path / "a", base, others))
    out = merged(tmp_path / "b", base, others, dtype="float32")
    assert same_bits(load(out), {name: tensor.float() for name, tensor in expected.items()})
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_rest_from_a_finetune(tmp_path: Path) -> None:
    base = random_state(0)
    other = finetune(base, 1)
    other["lm_head.weight"] = torch.randn(13, 6)
    other["value_head.weight"] = torch.randn(1, 6)
    result = load(merged(tmp_path, base, [other], rest_from="ft0"))
    for name in other.keys() - set(BLOCK_NAMES):
        assert torch.equal(result[name], other[name])
    masks = [reference_masks(base, other, BLOCK_NAMES, "0.1")]
    blocks = reference_stitch({name: base[name] for name in BLOCK_NAMES}, [other], masks)
    assert same_bits({name: result[name] for name in BLOCK_NAMES}, blocks)


def test_only_localizable_elements_count(tmp_path: Path) -> None:
    """Zero tensors, integer and float buffers, tied heads, 0-d and empty tensors."""
    base = random_state(0) | {
        "model.layers.0.zero.weight": torch.zeros(4),
        "model.layers.0.scalar": torch.tensor(2.0),
        "model.layers.0.empty": torch.empty(0, 3),
        "model.layers.0.rotary_emb.inv_freq": torch.rand(3),
        "model.layers.0.position_ids": torch.arange(5),
        "model.layers.0.attn.bias": torch.ones(1, 1, 2, 2),
    }
    other = finetune(base, 1)
    del other["lm_head.weight"]  # tied in the finetune, stored in the base
    other["model.layers.0.zero.weight"] = torch.zeros(4)
    out = merged(tmp_path, base, [other], localizer={"density": 0.5})
    manifest = json.loads((out / "locstitch.json").read_text())
    assert manifest["N"] == N + 4 + 1
    assert manifest["k"] == manifest["masks"]["ft0"]["ones"] == manifest["N"] // 2
    names = [*BLOCK_NAMES, "model.layers.0.zero.weight", "model.layers.0.scalar"]
    masks = [reference_masks(base, other, names, "0.5")]
    assert same_bits(load(out), reference_stitch(base, [other], masks))


def test_inputs_stay_as_they_are_and_nothing_else_is_left(tmp_path: Path) -> None:
    base = random_state(0)
    save(tmp_path / "base", base)
    save(tmp_path / "ft0", finetune(base, 1))
    before = files_of(tmp_path)
    quick_merge(tmp_path / "base", [tmp_path / "ft0"], out=tmp_path / "out", localizer=Magnitude(density=0.5))
    left = {name: digest for name, digest in files_of(tmp_path).items() if not name.startswith("out/")}
    assert left == before


def test_side_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    base = random_state(0)
    save(tmp_path / "base", base, config='{"model_type": "toy", "auto_map": {"AutoModel": "modeling_toy.Toy"}}')
    save(tmp_path / "ft0", finetune(base, 1), config='{"model_type": "toy", "of": "ft0"}')
    copied = {
        "tokenizer.json": b'{"a":\r\n 1}',
        "chat_template.jinja": b"{{ x }}\n",
        "additional_chat_templates/tools.jinja": b"{{ y }}",
        "modeling_toy.py": b"raise SystemExit('run')\n",
        "LICENSE": b"free",
    }
    left_out = {"README.md": b"# the base", "pytorch_model.bin": b"\x80", "onnx/model.onnx": b"\x00", ".git/x": b"y"}
    for name, content in {**copied, **left_out}.items():
        path = tmp_path / "base" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    out = merge_folders(tmp_path, [{"ref": str(tmp_path / "ft0"), "name": "ft0"}])
    assert {name: (out / name).read_bytes() for name in copied} == copied
    assert (out / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    assert b"# the base" not in (out / "README.md").read_bytes()
    assert not any((out / name).exists() for name in left_out if name != "README.md")
    other = merge_folders(tmp_path, [{"ref": str(tmp_path / "ft0"), "name": "ft0"}], files_from="ft0")
    assert (other / "config.json").read_bytes() == (tmp_path / "ft0" / "config.json").read_bytes()


def test_the_pinned_recipe_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_state(0, BF16)
    out = merged(tmp_path, base, [finetune(base, 1), finetune(base, 2)], localizer={"density": 0.2}, scale=0.7)
    recipe = (out / "locstitch.yaml").read_text()
    assert str(tmp_path) not in recipe
    from hf_locstitch.cli.main import main

    monkeypatch.chdir(tmp_path)  # local inputs are named without their path
    assert main(["merge", str(out / "locstitch.yaml"), "--out", "again"]) == 0
    assert files_of(tmp_path / "again") == files_of(out)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["base", "ft1"])
@pytest.mark.parametrize("name", ["model.layers.1.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_non_finite(tmp_path: Path, value: float, where: str, name: str, density: float) -> None:
    states = {"base": random_state(0)}
    states |= {f"ft{i}": finetune(states["base"], i) for i in range(2)}
    states[where][name].view(-1)[3] = value
    finetuned = [states["ft0"], states["ft1"]]
    unread = where == "ft1" and name == "lm_head.weight"  # not merged, so nobody looks at it
    if unread:
        merged(tmp_path, states["base"], finetuned, localizer={"density": density})
        return
    with pytest.raises(NonFiniteError) as raised:
        merged(tmp_path, states["base"], finetuned, localizer={"density": density})
    assert name in str(raised.value) and f"{where}/model.safetensors" in str(raised.value)
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))


def test_non_finite_let_through(tmp_path: Path) -> None:
    base = random_state(0)
    other = finetune(base, 1)
    other["model.layers.1.norm.weight"][3] = float("nan")
    result = load(merged(tmp_path, base, [other], allow_non_finite=True))
    assert result["model.layers.1.norm.weight"][3].isnan()


@pytest.mark.parametrize("method", ["locstitch", "average", "task-arithmetic", "ties"])
@pytest.mark.parametrize("name", ["model.layers.1.norm.weight", "lm_head.weight"])
def test_beyond_the_range_of_the_output(tmp_path: Path, method: str, name: str) -> None:
    """Merged, covered by a mask or not, or copied: no finite value becomes infinity unsaid."""
    base = random_state(0)
    base[name].view(-1)[3] = 1e5
    with pytest.raises(
        NonFiniteError, match=r"the value (100000|\d{5}\.\d) at flat index 3 is beyond the range of float16"
    ) as raised:
        merged(tmp_path, base, [finetune(base, 1)], method=method, dtype="float16")
    assert str(raised.value).startswith(f"{name}:")
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))


def test_a_sum_beyond_the_range(tmp_path: Path) -> None:
    base = random_state(0, torch.float16)
    other = {name: tensor.clone() for name, tensor in base.items()}
    other["model.layers.1.norm.weight"][0] = 60000
    with pytest.raises(NonFiniteError, match="beyond the range of float16"):
        merged(tmp_path, base, [other], method="task-arithmetic", scale=2.0)


def test_manifest_counts(tmp_path: Path) -> None:
    base = random_state(0)
    finetuned = [finetune(base, seed) for seed in range(3)]
    out = merged(tmp_path, base, finetuned, localizer={"density": 0.3})
    manifest = json.loads((out / "locstitch.json").read_text())
    masks = [
        torch.cat([m.flatten() for m in reference_masks(base, state, BLOCK_NAMES, "0.3").values()])
        for state in finetuned
    ]
    times = sum(mask.int() for mask in masks)
    assert manifest["covered_by"] == [int((times == count).sum()) for count in range(4)]
    both = int((masks[0] & masks[2]).sum())
    assert manifest["overlap"][1]["masks"] == ["ft0", "ft2"] and manifest["overlap"][1]["both"] == both
    assert manifest["overlap"][1]["jaccard"] == pytest.approx(both / int((masks[0] | masks[2]).sum()))
    for name, entry in manifest["outputs"].items():
        content = (out / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["size"], entry["sha256"])
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == {*manifest["outputs"], "locstitch.json"}
    inputs = {entry["name"]: entry["files"]["model.safetensors"] for entry in manifest["inputs"]}
    for name in ("base", "ft0", "ft2"):
        content = (tmp_path / name / "model.safetensors").read_bytes()
        assert inputs[name] == hashlib.sha256(content).hexdigest()


def test_pairs_and_ties_go_by_name_wherever_tensors_lie(tmp_path: Path) -> None:
    """Every file holds the tensors in another order, and nearly all scores are tied."""
    base = {name: tensor.round() for name, tensor in random_state(0).items()}
    finetuned = [
        {name: (tensor + 2 * random_state(i + 5)[name]).round() for name, tensor in base.items()} for i in (0, 1)
    ]
    save_sharded(tmp_path / "base", base, lambda names: [[name] for name in reversed(names)])
    save_sharded(tmp_path / "ft0", finetuned[0], lambda names: [[name] for name in names])
    save_sharded(tmp_path / "ft1", finetuned[1], lambda names: [names[3:], names[:3]])
    entries = [{"ref": str(tmp_path / f"ft{i}"), "name": f"ft{i}"} for i in (0, 1)]
    out = merge_folders(tmp_path, entries, Settings(chunk=5), localizer={"density": 0.37})
    masks = [reference_masks(base, state, BLOCK_NAMES, "0.37") for state in finetuned]
    assert same_bits(load(out), reference_stitch(base, finetuned, masks))

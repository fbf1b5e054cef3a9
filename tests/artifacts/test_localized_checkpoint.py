"""Localizing first and stitching later gives the bytes of one merge; what does not fit is refused before the work."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import BLOCK_NAMES, State, finetune, load, random_state, save, save_sharded
from helpers.runs import Killed, merge_folders, quick_localize, quick_merge, quick_stitch
from helpers.strategies import families
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_locstitch import Magnitude, load_localized, load_mask
from hf_locstitch.engine.execute import make
from hf_locstitch.engine.shard_writer import ShardWriter
from hf_locstitch.errors import CheckpointError, MismatchError, NonFiniteError, RecipeError, WorkError
from hf_locstitch.localize.localized_masks import LocalizedMask, by_chunk
from hf_locstitch.plan.planning import make_localize_plan, make_plan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.runtime.settings import Settings

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
UP = "model.layers.1.mlp.up_proj.weight"


def same_model(one: Path, other: Path) -> bool:
    """Equal weights, masks and side files, to the byte."""
    first, second = (
        {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file() and path.name not in ("README.md", "locstitch.yaml", "locstitch.json")
        }
        for folder in (one, other)
    )
    assert "model.safetensors" in first or "model.safetensors.index.json" in first
    return first == second


def both_ways(
    tmp: Path, base: State, finetuned: Sequence[State], how: Settings | None = None, how_else: Settings | None = None,
    localizer: dict[str, Any] | None = None, globs: dict[str, Any] | None = None, **fields: Any,
) -> tuple[Path, Path]:  # fmt: skip
    """One merge, and localizing and stitching with settings of their own. Returns both models."""
    save(tmp / "base", base)
    entries = [{"ref": str(save(tmp / f"ft{i}", state)), "name": f"ft{i}"} for i, state in enumerate(finetuned)]
    asked = {"localizer": localizer or {}, "figures": False, **(globs or {})}
    merged = merge_folders(tmp, entries, how, **asked, **fields)
    for entry in entries:
        recipe = make_recipe({"base": str(tmp / "base"), "finetuned": [entry], **asked})
        plan = make_localize_plan(recipe, how_else or Settings())
        make(plan, tmp / f"loc-{entry['name']}", Progress(False))
    recipe = make_recipe(
        {
            "base": str(tmp / "base"),
            "localized": [str(tmp / f"loc-{e['name']}") for e in entries],
            "figures": False,
            **fields,
        }
    )
    plan = make_plan(recipe, how_else or Settings())
    make(plan, tmp / "stitched", Progress(False))
    return merged, tmp / "stitched"


@settings(max_examples=25, deadline=None)
@given(family=families(), chunk=st.integers(1, 40))
def test_the_bytes_of_one_merge(
    tmp_path_factory: pytest.TempPathFactory, family: tuple[State, list[State], str, int], chunk: int
) -> None:
    """Ties, signed zeros, empty and 0-d tensors, weights that nobody changed, any density and chunk size."""
    base, finetuned, density, other = family
    one, two = both_ways(
        tmp_path_factory.mktemp("family"), base, finetuned, Settings(other, workers=2), Settings(chunk, workers=2),
        localizer={"density": float(density)},
    )  # fmt: skip
    assert same_model(one, two)
    records = [json.loads((folder / "locstitch.json").read_text()) for folder in (one, two)]
    alike = "localizer", "scale", "inputs", "N", "k", "masks", "covered_by", "overlap"
    assert [records[0][field] for field in alike] == [records[1][field] for field in alike]


@pytest.mark.parametrize(
    ("fields", "localizer"),
    [
        ({"scale": 0.3}, {"density": 0.4}),
        ({"shard_size": "500B"}, {"density": 0.29, "scope": "tensor"}),
        ({"dtype": "float16", "scale": 2.0}, {"density": 0.5}),
        ({"dtype": "float32"}, {"density": 0.05}),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_settings_of_the_merge(
    tmp_path: Path, dtype: torch.dtype, fields: dict[str, Any], localizer: dict[str, Any]
) -> None:
    base = random_state(0, dtype) | {
        "model.layers.0.scalar": torch.tensor(2.0, dtype=dtype),
        "model.layers.0.position_ids": torch.arange(5),
    }
    assert same_model(*both_ways(tmp_path, base, [finetune(base, i) for i in range(3)], localizer=localizer, **fields))


def test_tied_and_other_tensors(tmp_path: Path) -> None:
    """A head that the finetune does not store, globs, and dtypes that differ inside and between the models."""
    base = random_state(0, BF16)
    base["model.layers.1.norm.weight"] = base["model.layers.1.norm.weight"].float()
    wide = finetune({name: tensor.float() for name, tensor in base.items()}, 1)
    tied = finetune(base, 2)
    del wide["lm_head.weight"]
    globs = {"include": ["model.*"], "exclude": ["*embed*"]}
    one, two = both_ways(tmp_path, base, [wide, tied], localizer={"density": 0.37}, globs=globs)
    assert same_model(one, two)
    stored = load_localized(tmp_path / "loc-ft1")
    assert {stored.stored(name).dtype for name in stored.shapes} == {"BF16", "F32"}
    assert not any(
        stored.stored(name).start % (torch.finfo(stored.values(name).dtype).bits // 8) for name in stored.shapes
    )


@pytest.mark.parametrize("density", ["0", "0.3", "1"])
def test_what_is_stored(tmp_path: Path, density: str) -> None:
    base = random_state(0, BF16)
    wide = finetune({name: tensor.float() for name, tensor in base.items()}, 1)
    save(tmp_path / "base", base)
    save(tmp_path / "maths", wide)
    quick_localize(
        tmp_path / "base", tmp_path / "maths", out=tmp_path / "loc", localizer=Magnitude(density=float(density))
    )
    one, mask = load_localized(tmp_path / "loc"), load_mask(tmp_path / "loc")
    assert (one.name, one.N, one.ones, one.base.ref) == ("maths", 156, int(float(density) * 156), "./base")
    assert one.density == one.ones / 156 and set(one.shapes) == set(mask) == set(BLOCK_NAMES)
    assert one.ones == sum(int(kept.sum()) for kept in mask.values())
    for name, kept in mask.items():
        assert torch.equal(one.mask(name), kept)
        assert torch.equal(one.values(name), wide[name][kept]) and one.values(name).dtype == F32
        assert one.positions(name).tolist() == kept.flatten().nonzero().flatten().tolist()
    assert not list((tmp_path / "loc").glob("*.safetensors")) and not (tmp_path / "loc" / "config.json").exists()


def test_size(tmp_path: Path) -> None:
    """At density 5 % a bf16 model takes 5 % for values and about 2 % for the mask."""
    base = random_state(0, BF16, {f"layers.{i}.w": (400, 500) for i in range(5)})
    save(tmp_path / "base", base)
    save(tmp_path / "ft", finetune(base, 1))
    quick_localize(tmp_path / "base", tmp_path / "ft", out=tmp_path / "loc", localizer=Magnitude(density=0.05))
    size = sum(path.stat().st_size for path in (tmp_path / "loc").rglob("*.safetensors"))
    assert 0.05 < size / (2 * 10**6) < 0.07


def test_densities_and_names_of_their_own(tmp_path: Path) -> None:
    base = random_state(0)
    save(tmp_path / "base", base)
    for i, density in enumerate([0.1, 0.5]):
        save(tmp_path / f"ft{i}", finetune(base, i))
        quick_localize(
            tmp_path / "base", tmp_path / f"ft{i}", name="same", out=tmp_path / f"loc{i}",
            localizer=Magnitude(density=density),
        )  # fmt: skip
    refs = [tmp_path / "loc0", tmp_path / "loc1"]
    with pytest.raises(RecipeError, match=r"named 'same'.*--names"):
        quick_stitch(tmp_path / "base", refs, out=tmp_path / "out")
    record = quick_stitch(tmp_path / "base", refs, names=["few", "many"], out=tmp_path / "out").manifest
    assert record.k is None and record.localizer is None
    assert [(name, mask.ones, mask.density) for name, mask in record.masks.items()] == [
        ("few", 15, 0.1), ("many", 78, 0.5),
    ]  # fmt: skip
    few, many = (load_mask(tmp_path / "out", name) for name in ("few", "many"))
    merged, ft = load(tmp_path / "out"), [load(tmp_path / f"ft{i}") for i in range(2)]
    alone = few[UP] & ~many[UP], many[UP] & ~few[UP], ~few[UP] & ~many[UP]
    for where, source in zip(alone, [*ft, base], strict=True):
        assert where.any() and torch.equal(merged[UP][where], source[UP][where])
    both = few[UP] & many[UP]
    assert torch.equal(merged[UP][both], ((ft[0][UP].double() + ft[1][UP].double()) / 2).float()[both])


def test_the_pinned_recipes_make_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_locstitch.cli.main import main

    monkeypatch.chdir(tmp_path)
    base = random_state(0)
    both_ways(tmp_path, base, [finetune(base, 1), finetune(base, 2)], localizer={"density": 0.2})
    assert main(["localize", "loc-ft0/locstitch.yaml", "--out", "again", "--quiet"]) == 0
    for file in ("masks/ft0.safetensors", "values/ft0.safetensors", "locstitch.yaml", "README.md"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "loc-ft0" / file).read_bytes()
    for command, out in (("stitch", "a"), ("merge", "b")):
        assert main([command, "stitched/locstitch.yaml", "--out", out, "--quiet"]) == 0, capsys.readouterr().err
        assert same_model(tmp_path / "stitched", tmp_path / out)
        assert (tmp_path / out / "README.md").read_bytes() == (tmp_path / "stitched" / "README.md").read_bytes()


@pytest.fixture
def localized(tmp_path: Path) -> Path:
    """A folder with base, ft0, ft1, loc0, loc1."""
    base = random_state(0)
    save(tmp_path / "base", base)
    for i in range(2):
        save(tmp_path / f"ft{i}", finetune(base, i))
        quick_localize(
            tmp_path / "base", tmp_path / f"ft{i}", out=tmp_path / f"loc{i}", localizer=Magnitude(density=0.3)
        )
    return tmp_path


def refused(tmp: Path, kind: type[Exception], *words: str, base: str = "base", names: Sequence[str] = ("loc0", "loc1")):  # type: ignore[no-untyped-def]
    before = sorted(tmp.rglob("*"))
    with pytest.raises(kind) as raised:
        quick_stitch(tmp / base, [tmp / name for name in names], out=tmp / "out")
    for word in words:
        assert word in str(raised.value), raised.value
    assert sorted(tmp.rglob("*")) == before


def test_another_base(localized: Path) -> None:
    """Other values show when the files are hashed, before anything is merged; other files at once."""
    other = random_state(7)
    save(localized / "other", other)
    refused(localized, CheckpointError, "was localized against ./base", "sha256", "Use the base", base="other")
    save_sharded(localized / "cut", random_state(0), lambda names: [names[:4], names[4:]])
    refused(localized, MismatchError, "was localized against ./base, where model-00001-of-00002", base="cut")
    save(localized / "ft2", finetune(other, 2))
    quick_localize(localized / "other", localized / "ft2", out=localized / "loc2", localizer=Magnitude(density=0.3))
    refused(localized, MismatchError, "loc0 was localized against the base ./base", "./other", names=["loc0", "loc2"])


def test_other_tensors_and_shapes(localized: Path) -> None:
    quick_localize(localized / "base", localized / "ft1", out=localized / "fewer", exclude=["*up_proj*"])
    refused(localized, MismatchError, "ranges over model.layers.1.mlp.up_proj.weight", "(and 1 more)",
            names=["loc0", "fewer"])  # fmt: skip
    state = {name: tensor for name, tensor in random_state(0).items() if "q_proj" not in name}
    save(localized / "wider", state | {UP: torch.zeros(4, 6)})
    refused(localized, MismatchError, "has model.layers.0.self_attn.q_proj.weight, which the base", "lacks",
            f"{UP} is [9, 6] in", "F32 [4, 6] in the base", base="wider")  # fmt: skip


@pytest.mark.parametrize("file", ["masks/ft0.safetensors", "values/ft0.safetensors"])
def test_damage(localized: Path, file: str) -> None:
    path = localized / "loc0" / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(localized, CheckpointError, f"{file} is damaged: it has sha256", "Fetch it again")
    path.write_bytes(content[:-1])
    refused(localized, CheckpointError, f"{file} has {len(content) - 1} bytes, its manifest says {len(content)}")
    path.unlink()
    refused(localized, CheckpointError, f"it lacks {file}")


def test_a_mask_and_values_that_do_not_fit(localized: Path) -> None:
    """Two ones moved to another tensor, with every hash as it should be: found while reading."""
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import save_file

    from hf_locstitch.artifacts.mask_file import encode_positions

    path = localized / "loc0" / "masks" / "ft0.safetensors"
    one = load_localized(localized / "loc0")
    places = {name: one.positions(name) for name in one.shapes}
    norm = "model.layers.0.norm.weight"
    places[UP] = places[UP][2:]
    places[norm] = np.sort(np.append(places[norm], np.setdiff1d(np.arange(6), places[norm])[:2]))
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    coded = {name: np.frombuffer(encode_positions([(0, at.astype(np.int32))]), np.uint8) for name, at in places.items()}
    save_file(coded, path, metadata=metadata)
    record = json.loads((localized / "loc0" / "locstitch.json").read_text())
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    record["outputs"]["masks/ft0.safetensors"] = {"size": len(content), "sha256": digest}
    (localized / "loc0" / "locstitch.json").write_text(json.dumps(record))
    refused(localized, CheckpointError, "its mask keeps", "stored. Download it again")


def test_what_is_no_localized_checkpoint(localized: Path) -> None:
    refused(localized, CheckpointError, "ft0 has no locstitch.json", "hf-locstitch localize", names=["ft0"])
    quick_merge(localized / "base", [localized / "ft0"], out=localized / "merged")
    refused(localized, CheckpointError, "is a merged model, not a localized checkpoint", names=["merged"])
    with pytest.raises(CheckpointError, match=r"is a localized checkpoint, not a whole model.*hf-locstitch stitch"):
        quick_merge(localized / "base", [localized / "loc0"], out=localized / "out")
    with pytest.raises(CheckpointError, match="damaged"):
        record = json.loads((localized / "loc0" / "locstitch.json").read_text())
        record["masks"]["ft0"]["ones"] += 1
        (localized / "loc0" / "locstitch.json").write_text(json.dumps(record))
        load_localized(localized / "loc0")


def test_what_cannot_be_asked_for(localized: Path) -> None:
    base, refs = localized / "base", [localized / "loc0"]
    asked = {"base": str(base), "localized": [str(refs[0])]}
    one = {"base": str(base), "finetuned": [str(localized / "ft0")]}
    with pytest.raises(RecipeError, match="localizer, include cannot be set for localized checkpoints"):
        make_recipe({**asked, "localizer": {"density": 0.1}, "include": ["*"]})
    with pytest.raises(RecipeError, match="merged by method locstitch, not average"):
        make_recipe({**asked, "method": "average"})
    with pytest.raises(RecipeError, match="scale, dtype cannot be set for a localized checkpoint"):
        make_localize_plan(make_recipe({**one, "scale": 0.5, "dtype": "float16"}))
    with pytest.raises(RecipeError, match="not for ties"):
        make_localize_plan(make_recipe({**one, "method": "ties"}))
    with pytest.raises(RecipeError, match="cannot be merged together"):
        make_recipe({**asked, "finetuned": [str(localized / "ft0")]})
    with pytest.raises(RecipeError, match="got 2 names for 1"):
        quick_stitch(base, refs, out=localized / "out", names=["a", "b"])


def test_nan_is_refused_and_let_through(tmp_path: Path) -> None:
    base = random_state(0)
    save(tmp_path / "base", base)
    broken = finetune(base, 1)
    broken[UP][0, 0] = float("nan")
    save(tmp_path / "ft", broken)
    with pytest.raises(NonFiniteError, match="allow-non-finite"):
        quick_localize(tmp_path / "base", tmp_path / "ft", out=tmp_path / "loc")
    quick_localize(tmp_path / "base", tmp_path / "ft", out=tmp_path / "loc", allow_non_finite=True)
    with pytest.raises(NonFiniteError, match="allow-non-finite"):
        quick_stitch(tmp_path / "base", [tmp_path / "loc"], out=tmp_path / "out")
    quick_stitch(tmp_path / "base", [tmp_path / "loc"], out=tmp_path / "out", allow_non_finite=True)
    quick_merge(tmp_path / "base", [tmp_path / "ft"], out=tmp_path / "merged", allow_non_finite=True)
    assert load(tmp_path / "out")[UP][0, 0].isnan() and same_model(tmp_path / "out", tmp_path / "merged")


@pytest.mark.parametrize(("owner", "method"), [(LocalizedMask, "parts"), (ShardWriter, "write")])
def test_a_cut_stitch_goes_on(localized: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> None:
    """What was read and written before is not read and written again."""
    refs, original, calls = [localized / "loc0", localized / "loc1"], getattr(owner, method), []

    def cut(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == whole + 4:
            raise Killed
        return original(*args, **kwargs)

    whole = -4
    monkeypatch.setattr(owner, method, cut)
    quick_stitch(localized / "base", refs, out=localized / "expected", shard_size="300B")
    whole = len(calls)
    with pytest.raises(Killed):
        quick_stitch(localized / "base", refs, out=localized / "out", shard_size="300B")
    assert not (localized / "out").exists() and len(list(localized.glob(".out.*.partial"))) == 1
    done = len(calls)
    quick_stitch(localized / "base", refs, out=localized / "out", shard_size="300B")
    assert same_model(localized / "expected", localized / "out") and not list(localized.glob(".*.partial"))
    assert len(calls) - done < whole


def test_a_full_disk_while_localizing(localized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_locstitch.engine import localize_run

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(localize_run, "write_values", full)
        with pytest.raises(WorkError, match="is full"):
            quick_localize(
                localized / "base", localized / "ft0", out=localized / "out", localizer=Magnitude(density=0.3)
            )
    quick_localize(localized / "base", localized / "ft0", out=localized / "out", localizer=Magnitude(density=0.3))
    for file in ("masks/ft0.safetensors", "values/ft0.safetensors"):
        assert (localized / "out" / file).read_bytes() == (localized / "loc0" / file).read_bytes()
    record = quick_localize(
        localized / "base", localized / "ft0", out=localized / "out", localizer=Magnitude(density=0.3)
    )
    assert record.manifest.is_localized  # recognised as finished
    shutil.rmtree(localized / "out")


@given(st.sets(st.integers(0, 199), max_size=80), st.lists(st.integers(0, 80), max_size=5), st.integers(1, 60))
def test_positions_by_chunk(ones: set[int], cuts: list[int], size: int) -> None:
    import numpy as np

    from hf_locstitch.runtime.chunks import chunks_of

    positions = np.array(sorted(ones), dtype=np.int64)
    parts = np.split(positions, sorted(min(cut, len(positions)) for cut in cuts))
    chunks = chunks_of([200], size)
    found = list(by_chunk(parts, chunks))
    assert [chunk for chunk, _ in found] == chunks
    assert np.concatenate([at + chunk.first for chunk, at in found]).tolist() == positions.tolist()
    assert all(len(at) == 0 or (at[0] >= 0 and at[-1] < chunk.count) for chunk, at in found)

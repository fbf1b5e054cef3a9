"""What a reference may name: repos, their subfolders, files, revisions and pull requests, components of diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.models import State, finetune, load, random_state, same_bits, save, save_sharded
from helpers.runs import quick_merge
from huggingface_hub import HfApi, constants
from safetensors.torch import save_file

from hf_locstitch import localize_from_hub, verify
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import Ref, parse_ref
from hf_locstitch.cli.main import main
from hf_locstitch.errors import CheckpointError, RecipeError
from loopback_hub import LoopbackHub

BASE = random_state(0)
FIRST, SECOND = finetune(BASE, 1), finetune(BASE, 2)
DENSITY = {"localizer": {"density": 0.3}}


@pytest.fixture
def due(tmp_path: Path) -> State:
    """The merge of plain folders."""
    folders = [save(tmp_path / name, state) for name, state in (("base", BASE), ("first", FIRST), ("second", SECOND))]
    quick_merge(folders[0], folders[1:], out=tmp_path / "due", **DENSITY)
    return load(tmp_path / "due")


def add(hub: LoopbackHub, repo: str, **folders: Path) -> None:
    """A repo with what is in these folders, each in a subfolder of its name; "root" is the repo's own."""
    files = {
        (file.name if name == "root" else f"{name}/{file.name}"): file
        for name, folder in folders.items()
        for file in folder.iterdir()
    }
    hub.add_repo(repo, files)


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("gpt2", Ref(repo="gpt2")),
        ("org/name", Ref(repo="org/name")),
        ("org/name@v1", Ref(repo="org/name", revision="v1")),
        ("org/name@refs/pr/3", Ref(repo="org/name", revision="refs/pr/3")),
        ("org/name/unet", Ref(repo="org/name", path="unet")),
        ("org/name/a/b c@main", Ref(repo="org/name", path="a/b c", revision="main")),
        ("org/name/a/x.safetensors", Ref(repo="org/name", path="a/x.safetensors")),
        ("./x/y.safetensors", Ref(folder=Path("x"), path="y.safetensors")),
    ],
)
def test_what_a_reference_names(text: str, ref: Ref) -> None:
    assert parse_ref(text) == ref


HOSTILE = [
    "org/name/../other", "org/name/..", "org//name", "org/name/", "org/name/a//b", "org/name/.git",
    "org/name/%2e%2e", "org/name@../x", "org/name@a/../b", "org/name@/etc", "org/name@", "org/name/@main", "@main", "",
    "org/name/a\nb", "org/name@a b", "org/name@a%2fb",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_references_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="neither an existing folder nor a repo"):
        parse_ref(text)


@pytest.mark.parametrize("cache", [True, False])
def test_subfolders(due: State, cache: bool, tmp_path: Path, home_hub: LoopbackHub) -> None:
    add(home_hub, "org/all", base=tmp_path / "base", first=tmp_path / "first")
    add(home_hub, "org/second", second=tmp_path / "second")
    result = quick_merge("org/all/base", ["org/all/first", "org/second/second@main"], out=tmp_path / "out",
                         cache=cache, **DENSITY)  # fmt: skip
    assert same_bits(load(tmp_path / "out"), due)
    assert [one.name for one in result.manifest.inputs] == ["base", "first", "second"]
    pinned = [one.ref for one in result.manifest.inputs]
    assert pinned[1] == f"org/all/first@{home_hub.head('org/all')}"
    assert main(["merge", str(tmp_path / "out" / "locstitch.yaml"), "--out", str(tmp_path / "again"), "--quiet"]) == 0
    assert same_bits(load(tmp_path / "again"), due)
    report = verify(tmp_path / "out", tensors="all")
    assert report.ok and not report.skipped, report.describe()
    assert (
        f"[org/all/first]({constants.ENDPOINT}/org/all/tree/{pinned[1].partition('@')[2]}/first)"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_subfolders_offline(due: State, tmp_path: Path, home_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    add(home_hub, "org/all", base=tmp_path / "base", first=tmp_path / "first", second=tmp_path / "second")
    refs = ["org/all/base", "org/all/first", "org/all/second"]
    quick_merge(refs[0], refs[1:], out=tmp_path / "online", **DENSITY)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    quick_merge(refs[0], refs[1:], out=tmp_path / "out", **DENSITY)
    assert same_bits(load(tmp_path / "out"), due)


def test_a_subfolder_that_is_not_there(tmp_path: Path, home_hub: LoopbackHub) -> None:
    add(home_hub, "org/pipe", unet=save(tmp_path / "unet", BASE), vae=save(tmp_path / "vae", BASE))
    for ref, said in (("org/pipe/transformer", "has no transformer"), ("org/pipe", "holds no weights")):
        with pytest.raises(CheckpointError, match=rf"{said}.*folders unet, vae: name one, such as org/pipe/unet"):
            quick_merge(ref, ["org/pipe/unet"], out=tmp_path / "out")


def test_one_file(due: State, tmp_path: Path, home_hub: LoopbackHub) -> None:
    """Of several that lie together."""
    for name, state in (("first", FIRST), ("second", SECOND)):
        save_file(state, tmp_path / "base" / f"{name}-step9.safetensors")
    add(home_hub, "org/runs", root=tmp_path / "base")
    local = [str(tmp_path / "base" / f"{name}-step9.safetensors") for name in ("first", "second")]
    hub = [f"org/runs/{name}-step9.safetensors" for name in ("first", "second")]
    for number, files in enumerate((local, hub)):
        result = quick_merge(tmp_path / "base", files, out=tmp_path / f"out{number}", **DENSITY)
        assert same_bits(load(tmp_path / f"out{number}"), due)
        assert [one.name for one in result.manifest.inputs] == ["base", "first-step9", "second-step9"]
    assert verify(tmp_path / "out1", base=tmp_path / "base", finetuned=hub, tensors="all").ok


def test_one_shard_of_several(tmp_path: Path, home_hub: LoopbackHub) -> None:
    """Half a model, which would be merged as if it were a whole one."""
    base = save_sharded(tmp_path / "base", BASE, lambda names: [names[:4], names[4:]])
    add(home_hub, "org/sharded", root=base, sub=base)
    shard = "model-00001-of-00002.safetensors"
    said = r"00002\.safetensors(@\w+)? is one of the 2 files of a model that model\.safetensors\.index\.json lists"
    for ref in (f"{base}/{shard}", f"org/sharded/{shard}", f"org/sharded/sub/{shard}"):
        with pytest.raises(CheckpointError, match=said):
            quick_merge(ref, [ref], out=tmp_path / "out", **DENSITY)
    for content in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"x": 3}}'):  # from which only its name tells it
        (base / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"alone, one of the 2 files of a model"):
            open_checkpoint(parse_ref(f"{base}/{shard}"))


def test_an_adapter_in_a_subfolder(tmp_path: Path, home_hub: LoopbackHub) -> None:
    from helpers.adapters import save_base, save_lora

    base = save_base(tmp_path / "base")
    add(home_hub, "org/loras", one=save_lora(tmp_path / "one", base), two=save_lora(tmp_path / "two", base, seed=1))
    how = {"localizer": {"density": 0.02}}
    quick_merge(base, ["org/loras/one", "org/loras/two"], out=tmp_path / "out", **how)
    quick_merge(base, [tmp_path / "one", tmp_path / "two"], out=tmp_path / "local", **how)
    assert same_bits(load(tmp_path / "out"), load(tmp_path / "local"))


def test_a_localized_checkpoint_in_a_subfolder(due: State, tmp_path: Path, home_hub: LoopbackHub) -> None:
    from hf_locstitch import stitch_from_hub

    for name in ("first", "second"):
        localize_from_hub(tmp_path / "base", tmp_path / name, out=tmp_path / f"{name}-l", figures=False, **DENSITY)
    files = {
        f"{name}/{path.relative_to(tmp_path / f'{name}-l').as_posix()}": path
        for name in ("first", "second")
        for path in (tmp_path / f"{name}-l").rglob("*")
        if path.is_file()
    }
    home_hub.add_repo("org/skills", files)
    stitch_from_hub(tmp_path / "base", ["org/skills/first", "org/skills/second"], out=tmp_path / "out", figures=False)
    assert same_bits(load(tmp_path / "out"), due)


# ---- pull requests and variants ---------------------------------------------------------------------------------


def test_safetensors_in_a_pull_request_only(due: State, tmp_path: Path, home_hub: LoopbackHub) -> None:
    config = (tmp_path / "base" / "config.json").read_bytes()
    home_hub.add_repo("org/old", {"pytorch_model.bin": b"pickled", "config.json": config})
    api = HfApi()
    for file, content in (("notes.md", b"hello"), ("model.safetensors", tmp_path / "base" / "model.safetensors")):
        api.upload_file(path_or_fileobj=content, path_in_repo=file, repo_id="org/old", create_pr=True)
    with pytest.raises(CheckpointError, match=r"pull request 2 has safetensors: use org/old@refs/pr/2\."):
        quick_merge("org/old", [tmp_path / "first"], out=tmp_path / "out", **DENSITY)
    quick_merge("org/old@refs/pr/2", [tmp_path / "first", tmp_path / "second"], out=tmp_path / "out", **DENSITY)
    assert same_bits(load(tmp_path / "out"), due)


def test_without_such_a_pull_request(tmp_path: Path, home_hub: LoopbackHub) -> None:
    home_hub.add_repo("org/older", {"pytorch_model.bin": b"pickled"})
    with pytest.raises(CheckpointError, match="Convert it first"):
        quick_merge("org/older", [save(tmp_path / "first", FIRST)], out=tmp_path / "out", **DENSITY)


def half(state: State) -> State:
    return {name: value.half() for name, value in state.items()}


def test_variants(due: State, tmp_path: Path) -> None:
    """Full precision is taken where it is; else the one variant there is."""
    for name in ("base", "first", "second"):
        state = load(tmp_path / name)
        save_file(half(state), tmp_path / name / "model.fp16.safetensors", metadata={"format": "pt"})
    folders = [tmp_path / name for name in ("base", "first", "second")]
    result = quick_merge(folders[0], folders[1:], out=tmp_path / "out", **DENSITY)
    assert same_bits(load(tmp_path / "out"), due)
    assert any("model.fp16.safetensors" in warning for warning in result.manifest.warnings)
    for folder in folders:
        (folder / "model.safetensors").unlink()
    quick_merge(folders[0], folders[1:], out=tmp_path / "half", **DENSITY)
    merged = tmp_path / "half" / "model.safetensors"
    assert merged.exists() and not (tmp_path / "half" / "model.fp16.safetensors").exists()


def component(folder: Path, state: State, sharded: bool) -> Path:
    """As diffusers saves it."""
    names = {name.replace("model.layers", "transformer_blocks"): value for name, value in state.items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_class_name": "Transformer2DModel", "_diffusers_version": "0.35"}')
    if not sharded:
        save_file(names, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        return folder
    listed, weight_map = list(names), {}
    for number, some in enumerate((listed[:3], listed[3:]), start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: names[name] for name in some}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(some, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("sharded", [False, True])
def test_components_of_diffusers(sharded: bool, due: State, tmp_path: Path, home_hub: LoopbackHub) -> None:
    for number, state in enumerate((BASE, FIRST, SECOND)):
        made = component(tmp_path / f"c{number}", state, sharded)
        if not sharded:
            save_file(half(load(made)), made / "diffusion_pytorch_model.fp16.safetensors")
        add(home_hub, f"org/pipe{number}-{sharded}", transformer=made)
    refs = [f"org/pipe{number}-{sharded}/transformer" for number in range(3)]
    quick_merge(refs[0], refs[1:], names=["a", "b"], out=tmp_path / "out", **DENSITY)
    merged = {
        name.replace("transformer_blocks", "model.layers"): value for name, value in load(tmp_path / "out").items()
    }
    assert same_bits(merged, due)
    written = {path.name for path in (tmp_path / "out").glob("*diffusion*")}
    assert written == {path.name for path in (tmp_path / "c0").glob("*diffusion*") if "fp16" not in path.name}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_class_name"] == "Transformer2DModel"
    assert verify(tmp_path / "out", tensors="all").ok


def test_on_the_command_line(
    due: State, tmp_path: Path, home_hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    add(home_hub, "org/all", base=tmp_path / "base", first=tmp_path / "first")
    command = ["merge", "--base", "org/all/base", "--ft", "org/all/first", "--dry-run", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert f"finetuned  first  org/all/first@{home_hub.head('org/all')[:7]}" in capsys.readouterr().out

"""A merge taken apart and stitched again, with finetunes added or removed: the bytes of one merge of what results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from helpers.adapters import save_base, save_lora
from helpers.launch import launch
from helpers.models import State, finetune, load, random_state, save
from helpers.runs import Killed, files_of, quick_localize, quick_merge, quick_stitch
from helpers.streaming import empty_cache
from helpers.vocabularies import family, model, tokenizer
from helpers.vocabularies import save as save_model
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from hf_locstitch import merge_from_hub, plan_merge, stitch_from_hub, verify
from hf_locstitch.cli.main import main
from hf_locstitch.errors import CheckpointError, OutputError, RecipeError, RequestError
from hf_locstitch.plan.describe import format_plan, plan_json
from loopback_hub import LoopbackHub

OF_A_MERGE = ("locstitch.yaml", "README.md")  # what says how it was made


def made(folder: Path) -> dict[str, str]:
    """Hashes of weights, masks, config and the like."""
    return {file: digest for file, digest in files_of(folder).items() if file not in OF_A_MERGE}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, a (wider than the base), b, c, d, and `merged` of a, b and c; as working directory."""
    monkeypatch.chdir(tmp_path)
    base = random_state(0, torch.bfloat16)
    save(tmp_path / "base", base)
    for seed, name in enumerate("abcd", start=1):
        state: State = {key: value.float() for key, value in base.items()} if name == "a" else base
        save(tmp_path / name, finetune(state, seed))
    quick_merge("base", ["a", "b", "c"], out="merged", localizer={"density": 0.3})
    return tmp_path


def merge(*names: str, **fields: Any) -> dict[str, str]:
    """The files of one merge of these."""
    out = f"once-{'-'.join(names)}"
    quick_merge("base", list(names), out=out, **{"localizer": {"density": 0.3}, **fields})
    return made(Path(out))


def test_removed_and_added(home: Path) -> None:
    quick_localize("base", "d", out="d-localized", localizer={"density": 0.3})
    quick_stitch(from_="merged", remove="b", out="fewer")
    assert made(home / "fewer") == merge("a", "c")
    done = quick_stitch(from_="merged", add="d-localized", remove=["b", "c"], out="other")
    assert made(home / "other") == merge("a", "d")
    assert quick_stitch(from_="merged", add=["d-localized"], out="more").manifest.k == done.manifest.k == 46
    assert made(home / "more") == merge("a", "b", "c", "d")
    for folder in ("fewer", "other", "more"):
        assert verify(folder, tensors="all").findings == ()
    inputs = [(entry.role, entry.name, entry.ref) for entry in done.manifest.inputs]
    assert inputs == [("base", "base", "./base"), ("finetuned", "a", "./a"), ("finetuned", "d", "./d")]
    assert list(done.manifest.localized) == ["d"]
    assert "its mask from `./merged`" in (home / "other" / "README.md").read_text()


def test_the_pinned_recipe_and_once_more(home: Path) -> None:
    """What was taken apart is taken apart again, as are stitches of localized checkpoints."""
    quick_stitch(from_="merged", remove="b", out="fewer")
    assert main(["stitch", "fewer/locstitch.yaml", "--out", "again", "--no-figures", "--quiet"]) == 0
    assert files_of(home / "again") == files_of(home / "fewer")
    quick_stitch(from_="fewer", remove="c", out="one")
    assert made(home / "one") == merge("a")
    for name in "ad":
        quick_localize("base", name, out=f"{name}-localized", localizer={"density": 0.3})
    quick_stitch("base", ["a-localized", "d-localized"], out="stitched")
    shutil.rmtree("d")  # its values are in its localized checkpoint
    quick_stitch(from_="stitched", remove="a", out="d-alone")
    quick_stitch("base", ["d-localized"], out="d-expected")
    assert made(home / "d-alone") == made(home / "d-expected")
    shutil.rmtree("merged")
    quick_merge("base", ["a", "b"], out="merged", localizer={"density": 0.2})
    recipe = ["stitch", "fewer/locstitch.yaml", "--out", "wrong"]
    assert main([*recipe, "--quiet"]) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"scale": 0.5, "dtype": "float32", "shard_size": 500},
        {"localizer": {"density": 0.3, "scope": "tensor"}, "exclude": ["*norm*"]},
        {"localizer": {"density": 1.0}, "include": ["*"], "also_copy": ["*.txt"]},
    ],
    ids=["settings", "scope", "everything"],
)
def test_settings_of_the_merge_are_those_of_the_new_one(home: Path, fields: dict[str, Any]) -> None:
    (home / "base" / "notes.txt").write_text("notes")
    quick_merge("base", ["a", "b", "c"], out="own", **{"localizer": {"density": 0.3}, **fields})
    quick_stitch(from_="own", remove="c", out="fewer")
    assert made(home / "fewer") == merge("a", "b", **fields)


def on_the_hub(hub: LoopbackHub, home: Path) -> dict[str, str]:
    run_id, repos = uuid4().hex[:8], {}
    for name in ("base", "a", "b", "c"):
        repos[name] = f"demo/{run_id}-{name}"
        hub.add_repo(repos[name], {path.name: path for path in (home / name).iterdir()})
    return repos | {"merged": f"demo/{run_id}-merged", "fewer": f"demo/{run_id}-fewer"}


@pytest.mark.parametrize("cache", [True, False], ids=["caching", "passing"])
def test_from_the_hub(home: Path, home_hub: LoopbackHub, hub_cache: Path, cache: bool) -> None:
    """To the Hub, too; folders of the inputs are not needed."""
    repos = on_the_hub(home_hub, home)
    finetuned = [repos[name] for name in "abc"]
    quick_merge(repos["base"], finetuned, names=["a", "b", "c"], push_to=repos["merged"], localizer={"density": 0.3})
    expected = merge_from_hub(
        repos["base"], [repos["a"], repos["c"]], names=["a", "c"], localizer={"density": 0.3}, out="once", figures=False
    )
    empty_cache()
    way = [] if cache else ["--no-cache"]
    command = ["stitch", "--from", repos["merged"], "--remove", "b", "--no-figures", "--quiet", *way]
    assert main([*command, "--out", "fewer"]) == 0
    assert made(home / "fewer") == made(home / "once")
    assert cache or not [path for path in hub_cache.rglob("*") if path.name == "model.safetensors"]
    record = json.loads((home / "fewer" / "locstitch.json").read_text())
    assert [entry["commit"] for entry in record["inputs"]] == [one.commit for one in expected.manifest.inputs]
    assert main(["stitch", "fewer/locstitch.yaml", "--out", "again", "--no-figures", "--quiet", *way]) == 0
    assert files_of(home / "again") == files_of(home / "fewer")
    assert main([*command, "--push-to", repos["merged"]]) == 2  # it would take the place of its masks
    assert main([*command, "--push-to", repos["fewer"]]) == 0
    assert home_hub.read(repos["fewer"], "model.safetensors") == (home / "once" / "model.safetensors").read_bytes()


def test_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = save_base(tmp_path / "base", torch.bfloat16)
    for seed, name in enumerate(("one", "two", "three")):
        save_lora(tmp_path / name, base, seed)
    quick_merge("base", ["one", "two", "three"], out="own", localizer={"density": 0.3})
    quick_stitch(from_="own", remove="two", out="fewer")
    assert made(tmp_path / "fewer") == merge("one", "three")
    with pytest.raises(RecipeError, match="--no-cache"):
        quick_stitch(from_="own", remove="two", out="streamed", cache=False)


def test_in_two_processes(home: Path) -> None:
    done = launch(2, home, "--from", "./merged", "--remove", "b", "--out", "fewer", command="stitch")
    assert done.returncode == 0, done.stderr[-3000:]
    assert made(home / "fewer") == merge("a", "c")


def test_killed_and_run_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("hf_locstitch.engine.shard_writer.ShardWriter.write", killed)
        with pytest.raises(Killed):
            quick_stitch(from_="merged", remove="b", out="fewer")
    assert list(home.glob(".fewer*"))
    quick_stitch(from_="merged", remove="b", out="fewer")
    assert made(home / "fewer") == merge("a", "c") and not list(home.glob(".fewer*"))


def test_the_plan(home: Path) -> None:
    command = ["stitch", "--from", "merged", "--remove", "b", "--dry-run"]
    assert main(command) == 0
    quick_stitch(from_="merged", remove="b", out="fewer")
    plan = plan_merge("fewer/locstitch.yaml")
    assert "localized  a  a (its mask from merged)" in format_plan(plan)
    assert plan_json(plan)["masks_from"] == {"a": "./merged", "c": "./merged"}


def test_inputs_that_are_elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = merge("a", "c")
    (home / "elsewhere").mkdir()
    for name in ("base", "a", "c"):
        shutil.move(home / name, home / "elsewhere" / name)
    with pytest.raises(
        CheckpointError, match=r"the base \./base \(--base REF\); \./a, \./c \(--ft REF\.\.\., for a, c"
    ):
        quick_stitch(from_="merged", remove="b", out="fewer")
    where = ["--base", "elsewhere/base", "--ft", "elsewhere/a", "elsewhere/c"]
    command = ["stitch", "--from", "merged", "--remove", "b", "--no-figures", "--quiet"]
    assert main([*command, *where, "--out", "fewer"]) == 0
    assert made(home / "fewer") == expected
    for wrong in (["--ft", "elsewhere/c", "elsewhere/a"], ["--ft", "elsewhere/a"], ["--base", "elsewhere/a"]):
        assert main([*command, *where, *wrong, "--out", "wrong"]) == 2
    assert not (home / "wrong").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "average", "localizer": None}, "was merged by average"),
        ({"method": "ties"}, "was merged by ties"),
        ({"rest_from": "a"}, r"rest_from: a\): it does not consist of parts"),
        ({"files_from": "b"}, "files_from: b"),
    ],
    ids=["average", "ties", "rest_from", "files_from"],
)
def test_merges_that_do_not_consist_of_parts(home: Path, fields: dict[str, Any], words: str) -> None:
    given = {"localizer": {"density": 0.3}, **fields}
    quick_merge("base", ["a", "b"], out="own", **{key: value for key, value in given.items() if value is not None})
    with pytest.raises(RecipeError, match=words):
        quick_stitch(from_="own", remove="b", out="fewer")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stitch": {"method": "refit"}}, r"\(a refit\): without one of them"),
        ({"masks": "masks/joint.safetensors"}, r"\(a joint mask\): none of them has one of its own"),
    ],
    ids=["refit", "joint"],
)
def test_values_that_were_solved_for_together(home: Path, change: dict[str, Any], words: str) -> None:
    path = home / "merged" / "locstitch.json"
    record = json.loads(path.read_text())
    if "masks" in change:
        for mask in record["masks"].values():
            mask["file"] = change["masks"]
    else:
        record |= change
    path.write_text(json.dumps(record))
    with pytest.raises(RecipeError, match=words):
        quick_stitch(from_="merged", remove="b", out="fewer")


def fails(words: str, change: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stitch", *change, "--out", "fewer"]) == 2
    assert words in capsys.readouterr().err and not Path("fewer").exists()


def test_requests_that_make_no_sense(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick_localize("base", "a", out="a-localized")
    apart = ["--from", "merged"]
    fails("nothing is to be added to merged or removed", apart, capsys)
    fails("nothing of merged would be left", [*apart, "--remove", "a", "b", "c"], capsys)
    fails("is made of a, b, c: 'bb' is not one of them, did you mean 'b'?", [*apart, "--remove", "bb"], capsys)
    fails("of merged 2 stay (a, c): --ft expects 2, got 1", [*apart, "--remove", "b", "--ft", "a"], capsys)
    fails("two finetunes are named 'a'", [*apart, "--add", "a-localized"], capsys)
    fails("it is not a localized checkpoint", [*apart, "--add", "d"], capsys)
    fails("--from takes everything from the merge, beside --localized", [*apart, "--localized", "a"], capsys)
    fails("beside a recipe", ["merged/locstitch.yaml", *apart], capsys)
    fails("--add says what becomes of a merge, but none is given", ["--add", "a-localized"], capsys)
    fails("is a localized checkpoint, not a merge", ["--from", "a-localized", "--remove", "a"], capsys)
    fails("it was not made by hf-locstitch", ["--from", "base", "--remove", "a"], capsys)
    for wrong in ({"add": "a"}, {"from_": "merged", "remove": "b", "localized": "a"}):
        with pytest.raises(RecipeError):
            stitch_from_hub("base", out="fewer", **wrong)  # type: ignore[arg-type]


def test_damage(home: Path) -> None:
    mask = home / "merged" / "masks" / "a.safetensors"
    mask.write_bytes(mask.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match=r"masks/a\.safetensors is damaged"):
        quick_stitch(from_="merged", remove="b", out="fewer")
    mask.write_bytes(b"{}")
    with pytest.raises(RequestError):
        quick_stitch(from_="merged", remove="b", out="fewer")
    mask.unlink()
    with pytest.raises(CheckpointError, match=r"it lacks masks/a\.safetensors"):
        quick_stitch(from_="merged", remove="b", out="fewer")
    (home / "merged" / "locstitch.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"has no locstitch\.yaml"):
        quick_stitch(from_="merged", remove="b", out="fewer")


def test_another_finetune_of_that_name(home: Path) -> None:
    shutil.rmtree("a")
    save(home / "a", finetune(random_state(0, torch.bfloat16), 9))
    with pytest.raises(CheckpointError, match="sha256"):
        quick_stitch(from_="merged", remove="b", out="fewer")
    with pytest.raises(OutputError):
        quick_stitch(from_="merged", remove="a", out="base")


# ---- tokens of the finetunes --------------------------------------------------------------------------------------


@pytest.fixture
def speakers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, math and chat with tokens of their own, plain with none; as working directory."""
    monkeypatch.chdir(tmp_path)
    made = family(tmp_path, tied=False, dtype=torch.bfloat16)
    base = LlamaForCausalLM.from_pretrained(made["base"])
    save_model(tmp_path / "plain", model(24, tied=False, seed=7, base=base, dtype=torch.bfloat16), tokenizer())
    return tmp_path


TOKEN_CHOICES: list[dict[str, str]] = [
    {},
    {"tokenizer": "base"},
    {"tokenizer": "math"},
    {"embeddings": "mean"},
    {"embeddings": "math"},
    {"chat_template": "math"},
    {"chat_template": "./my.jinja", "tokenizer": "math"},
]


@pytest.mark.parametrize("asked", TOKEN_CHOICES, ids=str)
def test_tokens_rows_and_the_template_stay(speakers: Path, asked: dict[str, str]) -> None:
    (speakers / "my.jinja").write_text("{{ messages }}")
    quick_merge("base", ["math", "chat", "plain"], out="merged", localizer={"density": 0.3}, **asked)
    done = quick_stitch(from_="merged", remove="chat", out="fewer")
    assert made(speakers / "fewer") == merge("math", "plain", **asked)
    assert verify("fewer", tensors="all").findings == ()
    assert (done.manifest.vocabulary is None) == (asked.get("tokenizer") == "base")
    if not asked:  # without the finetunes that added tokens there are none
        quick_stitch(from_="merged", remove=["chat", "math"], out="none")
        assert made(speakers / "none") == merge("plain")
    recipe = ["stitch", "fewer/locstitch.yaml", "--out", "again", "--no-figures", "--quiet"]
    assert main(recipe) == 0 and made(speakers / "again") == made(speakers / "fewer")


def test_a_localized_checkpoint_among_finetunes_with_tokens(speakers: Path) -> None:
    quick_merge("base", ["math", "chat"], out="merged", localizer={"density": 0.3})
    quick_localize("base", "plain", out="plain-localized", localizer={"density": 0.3})
    done = quick_stitch(from_="merged", add="plain-localized", remove="chat", out="other")
    assert made(speakers / "other") == merge("math", "plain")
    assert verify("other", tensors="all").findings == ()
    assert any("a localized checkpoint has the base's tokens alone" in line for line in done.manifest.warnings)


def test_tokens_that_cannot_be_carried_over(speakers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick_localize("base", "plain", out="plain-localized", localizer={"density": 0.3})
    asked: list[tuple[dict[str, str], list[str], str]] = [
        ({"tokenizer": "math"}, ["--remove", "math"], "has tokenizer: math, of a finetune that is to be removed"),
        ({"chat_template": "math"}, ["--remove", "math"], "has chat_template: math"),
        ({"embeddings": "mean"}, ["--add", "plain-localized"], "what is added has no embeddings of its own"),
        ({"embeddings": "localize"}, ["--remove", "math"], "range over rows of embeddings that are matched"),
    ]
    for number, (fields, change, words) in enumerate(asked):
        quick_merge("base", ["math", "chat"], out=f"m{number}", localizer={"density": 0.3}, **fields)
        fails(words, ["--from", f"m{number}", *change], capsys)


def test_rows_in_their_places_may_be_localized(speakers: Path) -> None:
    """Where all have the base's tokens."""
    for name in ("one", "two"):
        shutil.copytree("plain", name)
        state = load(speakers / name)
        save_file(finetune(state, len(name) + ord(name[0])), f"{name}/model.safetensors", metadata={"format": "pt"})
    fields = {"embeddings": "localize"}
    quick_merge("base", ["plain", "one", "two"], out="merged", localizer={"density": 0.3}, **fields)
    quick_stitch(from_="merged", remove="one", out="fewer")
    assert made(speakers / "fewer") == merge("plain", "two", **fields)


@pytest.mark.parametrize("cache", [True, False], ids=["caching", "passing"])
def test_tokens_from_the_hub(speakers: Path, home_hub: LoopbackHub, hub_cache: Path, cache: bool) -> None:
    org = f"t{uuid4().hex[:8]}"
    for name in ("base", "math", "chat"):
        home_hub.add_repo(f"{org}/{name}", {path.name: path for path in (speakers / name).iterdir()})
    refs = [f"{org}/math", f"{org}/chat"]
    quick_merge(f"{org}/base", refs, push_to=f"lab/{org}", localizer={"density": 0.3})
    quick_merge(f"{org}/base", refs[:1], out="once", localizer={"density": 0.3})
    empty_cache()
    quick_stitch(from_=f"lab/{org}", remove="chat", out="fewer", cache=cache)
    assert made(speakers / "fewer") == made(speakers / "once")

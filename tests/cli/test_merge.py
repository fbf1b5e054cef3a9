"""The command line as a person uses it: what it prints, what it returns, what it leaves behind."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from helpers.models import State, finetune, load, same_bits, save
from helpers.systems import needs_own_imports
from safetensors.torch import save_file

from hf_locstitch.cli.arguments import build_parser
from hf_locstitch.cli.main import main
from loopback_hub import LoopbackHub

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in an empty folder; exit status, standard output, standard error."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(*args: object) -> tuple[int, str, str]:
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as error:  # argparse
            status = int(error.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def merge(run: Run, base: State, tmp_path: Path) -> Run:
    """`hf-locstitch merge` on a good base and finetune, unless the arguments say otherwise."""
    save(tmp_path / "ft", finetune(base, 1))

    def merge(*args: object) -> tuple[int, str, str]:
        given = [str(arg) for arg in args]
        start: list[object] = ["merge", "--no-figures"]
        if "--base" not in given:
            start += ["--base", tmp_path / "base"]
        if "--ft" not in given:
            start += ["--ft", tmp_path / "ft"]
        if not {"--out", "--push-to", "--dry-run"} & set(given):
            start += ["--out", tmp_path / "out"]
        return run(*start, *given)

    return merge


def refused(tmp_path: Path, result: tuple[int, str, str], *words: str) -> str:
    """The request was answered with exit status 2 and one paragraph naming `words`; nothing was written."""
    status, out, err = result
    assert status == 2, err
    assert out == ""
    assert "Traceback" not in err
    for word in words:
        assert word in err, err
    assert not list(tmp_path.glob("**/out*")) and not list(tmp_path.glob("**/*.partial"))
    return err


@needs_own_imports
@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_are_quick(flag: str) -> None:
    """They import nothing that is slow to import."""
    command = [sys.executable, "-X", "importtime", "-m", "hf_locstitch", flag]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "hf_locstitch.cli.main" in imported
    assert not imported & {"torch", "transformers", "huggingface_hub", "pydantic", "numpy", "yaml", "rich", "shtab"}
    assert "hf-locstitch" in done.stdout


def test_merge_prints_the_plan_and_the_place(merge: Run, tmp_path: Path) -> None:
    status, out, err = merge("--density", "0.2")
    assert (status, out) == (0, "")
    assert "N = 156 elements in 5 tensors (53.1 % of the base); each mask keeps k = 31" in err
    assert str(tmp_path / "out") in err
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_end_says_what_was_chosen_and_what_to_type_next(run: Run, merge: Run, tmp_path: Path) -> None:
    """Folders that the manifest cannot find are named by the commands."""
    _, _, err = merge("--density", "0.2")
    assert "density    ft 19.87 %" in err
    verify, evaluate = (shlex.split(line)[1:] for line in re.findall(r"^next +(.*)$", err, re.MULTILINE))
    assert verify[0] == "verify" and run(*verify)[0] == 0
    assert evaluate[:2] == ["evaluate", str(tmp_path / "out")] and "--parents" not in evaluate
    given = ["--base", tmp_path / "base", "--ft", tmp_path / "ft", "--out", tmp_path / "localized"]
    _, _, err = run("localize", *given)
    _, stitch = re.findall(r"^next +(.*)$", err, re.MULTILINE)
    args = build_parser().parse_args(shlex.split(stitch)[1:])
    assert args.command == "stitch" and args.localized[0] == str(tmp_path / "localized")


def test_json(merge: Run, tmp_path: Path) -> None:
    status, out, _ = merge("--json", "--quiet", "--density", "0.2")
    result = json.loads(out)
    assert status == 0 and result["manifest"]["k"] == 31 and result["out"] == str(tmp_path / "out")


def test_quiet(merge: Run) -> None:
    status, out, err = merge("--quiet")
    assert (status, out) == (0, "") and err.count("\n") <= 3


def test_dry_run_writes_nothing(merge: Run, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    status, out, err = merge("--dry-run", "--density", "0.29")
    assert status == 0 and "k = 45" in out and err == ""
    status, out, _ = merge("--dry-run", "--json", "--out", tmp_path / "out")
    plan = json.loads(out)
    assert plan["N"] == 156 and plan["k"] == 15 and len(plan["localized"]) == 5
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_refuses_an_evaluation_that_is_impossible(run: Run, merge: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("evaluate: {data: {mine: ./none.jsonl}}")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    given = ["merge", recipe, "--base", tmp_path / "base", "--ft", tmp_path / "ft"]
    for more in (["--dry-run"], ["--out", tmp_path / "out"]):
        err = refused(tmp_path, run(*given, *more), "for which no objective is known")
        assert "method " not in err  # the plan is not printed


def test_a_folder_that_is_taken_is_said_before_the_plan(merge: Run, tmp_path: Path) -> None:
    assert merge()[0] == 0
    assert merge("--dry-run", "--out", tmp_path / "out")[0] == 0  # the same merge, which is done
    for more in ([], ["--dry-run", "--out", tmp_path / "out"]):
        status, out, err = merge("--density", "0.5", *more)
        assert status == 2 and "exists and is not an empty folder" in err
        assert "method" not in out + err


def test_recipe_and_flags_that_override_it(run: Run, merge: Run, base: State, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {tmp_path / 'base'}\nfinetuned:\n  - {tmp_path / 'ft'}\n"
        f"localizer:\n  density: 0.5\nfigures: false\nout: {tmp_path / 'a'}\n"
    )
    assert run("merge", recipe)[0] == 0
    assert merge("--density", "0.5", "--out", tmp_path / "b")[0] == 0
    assert same_bits(load(tmp_path / "a"), load(tmp_path / "b"))
    assert run("merge", recipe, "--density", "0.25", "--scope", "tensor", "--out", tmp_path / "c")[0] == 0
    manifest = json.loads((tmp_path / "c" / "locstitch.json").read_text())
    assert manifest["localizer"] == {"method": "magnitude", "density": 0.25, "scope": "tensor"}


@pytest.mark.parametrize("density", ["1.5", "-0.1", "nan", "inf", "1e400"])
def test_density_out_of_range(merge: Run, tmp_path: Path, density: str) -> None:
    refused(tmp_path, merge(f"--density={density}"), "localizer.density")


def test_no_place_for_the_result(run: Run, base: State, tmp_path: Path) -> None:
    refused(tmp_path, run("merge", "--base", tmp_path / "base", "--ft", tmp_path / "base"), "--out DIR")


def test_a_name_that_leaves_no_room_for_the_work_beside_it(merge: Run, tmp_path: Path) -> None:
    for name in ("x" * 240, "x" * 300):
        for more in ([], ["--dry-run"]):
            refused(tmp_path, merge("--out", tmp_path / name, *more), "at most 200 bytes long")


@pytest.mark.usefixtures("merge")  # its models
@pytest.mark.parametrize("command", ["merge", "localize"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_density_that_keeps_nothing(run: Run, tmp_path: Path, command: str, scope: str) -> None:
    asked = ["--base", tmp_path / "base", "--ft", tmp_path / "ft", "--scope", scope, "--out", tmp_path / "out"]
    refused(tmp_path, run(command, *asked, "--density", "1e-12"), "density 1e-12 keeps none of the 156")


def test_too_few_names(run: Run, merge: Run, tmp_path: Path) -> None:
    refused(tmp_path, merge("--names", "a", "b"), "2 names for 1 finetune. Give one name per finetune")
    stitch = ["stitch", "--base", tmp_path / "base", "--localized", "x/y", "--names", "a", "b"]
    refused(tmp_path, run(*stitch), "2 names for 1 localized checkpoint. Give one name per localized checkpoint")


def test_a_terminal_that_knows_no_letters_and_a_reader_that_has_seen_enough(merge: Run, tmp_path: Path) -> None:
    (tmp_path / "ft").rename(tmp_path / "größe")
    assert merge("--ft", tmp_path / "größe")[0] == 0
    command = [sys.executable, "-m", "hf_locstitch", "inspect", str(tmp_path / "out")]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=ascii_only, check=False)
    assert done.returncode == 0 and b"gr\\xf6\\xdfe" in done.stdout, done.stderr
    for asked in (command, [*command[:3], "--print-completion", "bash"]):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(asked, stdout=writing, stderr=subprocess.PIPE, check=False)
        os.close(writing)
        assert done.returncode == 0 and done.stderr == b""


def test_a_console_of_windows(merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code page 1252 has é and ×, but no τ."""
    (tmp_path / "ft").rename(tmp_path / "модель")
    assert merge("--ft", tmp_path / "модель")[0] == 0
    out, error = (io.TextIOWrapper(io.BytesIO(), "cp1252", write_through=True) for _ in range(2))
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", error)
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "модель".encode("ascii", "backslashreplace") in out.buffer.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(SystemExit, match="0"):
        main(["merge", "--help"])
    assert main(["inspect", "./\u03c4"]) == 2 and b"the folder \\u03c4 does not exist" in error.buffer.getvalue()  # type: ignore[attr-defined]


def test_usage(run: Run, merge: Run, tmp_path: Path) -> None:
    refused(tmp_path, run(), "usage")
    refused(
        tmp_path, run("merge", "--out", tmp_path / "out"), "'base' is missing (--base REF)", "'finetuned' is missing"
    )
    refused(tmp_path, run("mrege"), "'mrege' is not one of merge, localize,", "Did you mean merge?")
    refused(tmp_path, merge("--densty", "0.1"), "no flag --densty. Did you mean --density?", "merge --help")
    refused(tmp_path, merge("--densty=0.1"), "no flag --densty. Did you mean --density?")
    refused(tmp_path, merge("--finetuned", "x"), "no flag --finetuned. Did you mean --ft?")
    refused(tmp_path, run("merge", "a.yaml", "b.yaml"), "'b.yaml' is one value too many")
    refused(tmp_path, merge("--method", "tie"), "'tie' is not one of ace, average,", "Did you mean ties?")
    refused(tmp_path, merge("--method", "xyz"), "'xyz' is not one of ace, average,")
    refused(tmp_path, run("merge", "--base", tmp_path / "bas", "--ft", tmp_path / "ft", "--dry-run"),
            f"Did you mean {tmp_path / 'base'}?")  # fmt: skip
    refused(tmp_path, merge("--names", "a", "b"), "2 names", "1 finetune.")
    refused(tmp_path, merge("--names", "../evil"), "finetuned.0.name")
    refused(tmp_path, merge("--private"), "push_to")
    refused(tmp_path, merge("--shard-size", "much"), "shard_size")


def test_a_flag_of_several_values_adds_up() -> None:
    given = build_parser().parse_args(
        ["merge", "--base", "a", "--base", "b", "--ft", "x", "--exclude", "p", "q", "--ft", "y", "z", "--exclude", "r"]
    )
    assert (given.base, given.ft, given.exclude, given.include) == ("b", ["x", "y", "z"], ["p", "q", "r"], None)
    asked = [build_parser().parse_args(f"evaluate m {flags}".split()) for flags in ("--tasks a --tasks b", "--tasks c")]
    assert [one.tasks for one in asked] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("xyz: 0.2", ["unknown key 'xyz'", "choose from base, localized, finetuned"]),
        ("finetune: [x]", ["unknown key 'finetune'", "did you mean 'finetuned'"]),
        ("localizer: {densty: 0.2}", ["unknown key 'localizer.densty'", "did you mean 'density'"]),
        ("localizer: {density: much}", ["localizer.density"]),
        ("- a\n- b", ["must hold fields"]),
        ("base: [", ["not valid YAML: line 1, column 8: "]),
        ("", ["must hold fields", "but is empty"]),
        ("base: {ref: x, sha: y}", ["unknown key 'base.sha'", "did you mean 'sha256'"]),
    ],
)
def test_wrong_recipe(run: Run, tmp_path: Path, content: str, words: list[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    refused(tmp_path, run("merge", recipe, "--out", tmp_path / "out"), *words)


def test_missing_recipe(run: Run, tmp_path: Path) -> None:
    refused(tmp_path, run("merge", tmp_path / "none.yaml", "--out", tmp_path / "out"), "none.yaml")


def test_all_mismatches_at_once(merge: Run, base: State, tmp_path: Path) -> None:
    renamed = {name.replace("norm.weight", "norm.gain"): tensor for name, tensor in finetune(base, 2).items()}
    save(tmp_path / "renamed", renamed, config='{"model_type": "other"}')
    reshaped = finetune(base, 3)
    reshaped["model.layers.1.mlp.up_proj.weight"] = torch.zeros(4, 6)
    save(tmp_path / "reshaped", reshaped)
    err = refused(
        tmp_path,
        merge(
            "--ft", tmp_path / "renamed", tmp_path / "reshaped", "--include", "model.layers.*", "--exclude", "no.such*"
        ),
        "renamed lacks model.layers.0.norm.weight",
        "and 1 more",
        "has model.layers.0.norm.gain",
        "is a other model",
        "model.layers.1.mlp.up_proj.weight is [4, 6] in",
        "[9, 6] in the base",
        "no.such*",
    )
    assert "5 problems" in err


def test_a_prefix_is_seen(merge: Run, base: State, tmp_path: Path) -> None:
    save(tmp_path / "headless", {name.removeprefix("model."): tensor for name, tensor in finetune(base, 2).items()})
    status, _, err = merge("--ft", tmp_path / "headless")
    assert (
        status == 0
        and "headless names 7 tensors otherwise than the base, such as embed_tokens.weight for model." in err
    )


def test_a_prefix_that_could_be_two_things_is_explained(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "two", {f"{side}.layers.0.w": torch.ones(3) for side in "ab"})
    save(tmp_path / "one", {"layers.0.w": torch.ones(3)})
    said = run("merge", "--base", tmp_path / "two", "--ft", tmp_path / "one", "--out", tmp_path / "out")
    refused(tmp_path, said, "begin with 'a.'")


def test_packed_weights(merge: Run, base: State, tmp_path: Path) -> None:
    packed = finetune(base, 2)
    packed["model.layers.1.mlp.up_proj.weight"] = torch.zeros(9, 6, dtype=torch.uint8)
    save(tmp_path / "packed", packed)
    refused(tmp_path, merge("--ft", tmp_path / "packed"), "packed is quantized", "as U8 [9, 6]", "unquantized")


def test_nothing_localizable(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "flat", {"weight": torch.ones(3)})
    flat = tmp_path / "flat"
    refused(tmp_path, run("merge", "--base", flat, "--ft", flat, "--out", tmp_path / "out"), "localizable", "--include")


def test_globs_that_leave_nothing(merge: Run, tmp_path: Path) -> None:
    said = refused(tmp_path, merge("--include", "*norm*", "--exclude", "model.*"), "--include *norm* and --exclude mod")
    assert "is localizable" not in said
    said = refused(tmp_path, merge("--include", "nope"), "the glob 'nope' matches no tensor")
    assert "problems" not in said


def test_names_twice(merge: Run, tmp_path: Path) -> None:
    refused(tmp_path, merge("--ft", tmp_path / "ft", tmp_path / "ft"), "named 'ft'", "--names")
    refused(tmp_path, merge("--ft", tmp_path / "base"), "named 'base'", "--names")
    status, _, err = merge("--ft", tmp_path / "ft", tmp_path / "ft", "--names", "a", "b")
    assert status == 0, err


def test_differences_elsewhere_are_warnings(merge: Run, base: State, tmp_path: Path) -> None:
    other = finetune(base, 2)
    other["lm_head.weight"] = torch.randn(14, 6)
    other["score.weight"] = torch.randn(2, 6)
    save(tmp_path / "bigger", other)
    status, _, err = merge("--ft", tmp_path / "bigger")
    assert status == 0
    assert "lm_head.weight [14, 6] (base [11, 6])" in err and "score.weight (not in the base)" in err
    assert torch.equal(load(tmp_path / "out")["lm_head.weight"], base["lm_head.weight"])


def test_missing_folder(merge: Run, tmp_path: Path) -> None:
    refused(tmp_path, merge("--ft", tmp_path / "nowhere"), "nowhere does not exist")
    refused(tmp_path, merge("--ft", "not a ref"), "'not a ref'", "org/name")
    refused(tmp_path, merge("--ft", "org/name@"), "'org/name@'")


def test_out_not_empty(merge: Run, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("years of work")
    refused(tmp_path, merge("--out", kept), "not an empty folder")
    assert (kept / "thesis.txt").read_text() == "years of work" and len(list(kept.iterdir())) == 1
    refused(tmp_path, merge("--out", kept / "thesis.txt"), "not an empty folder")
    (tmp_path / "empty").mkdir()
    assert merge("--out", tmp_path / "empty")[0] == 0


def test_not_enough_disk(merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(tmp_path, merge(), "disk", "100 B is free")


def weights(tmp_path: Path, content: bytes) -> Path:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    return folder


def header(entries: object, data: bytes) -> bytes:
    raw = entries.encode() if isinstance(entries, str) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"\x10\0\0", "3 bytes"),
        (struct.pack("<Q", 1 << 60) + b"{}", "claims a header of 1152921504606846976 bytes"),
        (struct.pack("<Q", 99) + b"{}", "claims a header of 99 bytes"),
        (header("{nonsense", b""), "malformed"),
        (header("[]", b""), "malformed"),
        (header({"a": {"dtype": "F32"}}, b""), "malformed"),
        (header({"layers.0.a": entry(0, 8), "layers.0.b": entry(4, 12)}, bytes(12)), "overlaps"),
        (header({"layers.0.a": entry(0, 8), "layers.0.b": entry(12, 16)}, bytes(16)), "leaves a gap"),
        (header({"layers.0.a": entry(0, 8)}, bytes(4)), "truncated"),
        (header({"layers.0.a": entry(0, 8)}, bytes(12)), "belong to no tensor"),
        (header({"layers.0.a": entry(0, 8, [3])}, bytes(8)), "takes 12 bytes"),
        (header({"layers.0.a": entry(0, 8, [-2, -1])}, bytes(8)), "malformed"),
        (header('{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": {"dtype":"F32","shape":[1],'
                '"data_offsets":[4,8]}}', bytes(8)), "appears twice"),
    ],
)  # fmt: skip
def test_damaged_files(merge: Run, tmp_path: Path, content: bytes, words: str) -> None:
    refused(tmp_path, merge("--ft", weights(tmp_path, content)), "broken/model.safetensors", words)


def test_checkpoints_of_other_kinds(merge: Run, base: State, tmp_path: Path) -> None:
    def folder(name: str, **files: str) -> Path:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file.replace("__", ".")).write_text(content)
        return tmp_path / name

    refused(tmp_path, merge("--ft", folder("empty")), "holds no weights")
    refused(tmp_path, merge("--ft", folder("bin", pytorch_model__bin="x")), "pytorch_model.bin", "never opened")
    refused(tmp_path, merge("--ft", folder("gguf", a__gguf="x")), "GGUF")
    refused(tmp_path, merge("--ft", folder("adapter", adapter_config__json="{}")), "no adapter_model.safetensors")
    pickled = folder("pickled", adapter_config__json="{}", adapter_model__bin="x")
    refused(tmp_path, merge("--ft", pickled), "adapter_model.bin", "never opened", "save_pretrained")
    refused(tmp_path, merge("--ft", folder("two", a__safetensors="", b__safetensors="")), "neither")
    refused(tmp_path, merge("--ft", folder("json", config__json="{")), "config.json is not valid JSON")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, merge("--ft", tmp_path / "index"), "lacks model-00001-of-00002.safetensors")
    config = '{"model_type": "toy", "quantization_config": {"quant_method": "gptq"}}'
    save(tmp_path / "quantized", base, config=config)
    refused(tmp_path, merge("--ft", tmp_path / "quantized"), "quantized (gptq)")


def test_a_tensor_in_two_shards(merge: Run, base: State, tmp_path: Path) -> None:
    folder = tmp_path / "twice"
    folder.mkdir()
    for file in ("a.safetensors", "b.safetensors"):
        save_file(base, folder / file)
    weight_map = {name: file for name, file in zip(base, ["a.safetensors", "b.safetensors"] * 9, strict=False)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, merge("--ft", folder), "twice", "a.safetensors", "b.safetensors")


def test_nan_names_file_and_tensor(merge: Run, base: State, tmp_path: Path) -> None:
    broken = finetune(base, 2)
    broken["model.layers.1.norm.weight"][2] = float("nan")
    save(tmp_path / "broken", broken)
    refused(
        tmp_path,
        merge("--ft", tmp_path / "broken"),
        "broken/model.safetensors",
        "model.layers.1.norm.weight",
        "flat index 2 of 6",
        "--allow-non-finite",
    )


def test_other_weights_than_the_recipe_pins(run: Run, merge: Run, base: State, tmp_path: Path) -> None:
    assert merge("--out", tmp_path / "first")[0] == 0
    save(tmp_path / "elsewhere" / "ft", finetune(base, 9))
    recipe = (tmp_path / "first" / "locstitch.yaml").read_text()
    recipe = recipe.replace("./base", str(tmp_path / "base")).replace("./ft", str(tmp_path / "elsewhere" / "ft"))
    (tmp_path / "pinned.yaml").write_text(recipe)
    refused(tmp_path, run("merge", tmp_path / "pinned.yaml", "--out", tmp_path / "out"), "sha256", "different weights")


def test_hub_requests_that_are_refused(merge: Run, base: State, tmp_path: Path, home_hub: LoopbackHub,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    files = {file.name: file for file in (tmp_path / "base").iterdir()}
    name = uuid4().hex
    for kind, options in {"private": {"private": True}, "gated": {"gated": True}, "open": {}}.items():
        home_hub.add_repo(f"demo/{kind}-{name}", files, **options)
    refused(tmp_path, merge("--ft", f"demo/none-{name}"), f"demo/none-{name} does not exist")
    refused(tmp_path, merge("--ft", f"demo/open-{name}@v9"), "no revision 'v9'")
    refused(tmp_path, merge("--push-to", "stranger/merged"), "demo cannot push to stranger/merged", "demo, lab")
    refused(tmp_path, merge("--push-to", "merged"), "org/name")
    monkeypatch.delenv("HF_TOKEN")
    refused(tmp_path, merge("--ft", f"demo/private-{name}"), "private", "HF_TOKEN")
    refused(tmp_path, merge("--ft", f"demo/gated-{name}"), "gated", "ask for access")
    refused(tmp_path, merge("--push-to", "demo/merged"), "needs a token")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    err = refused(tmp_path, merge("--push-to", "demo/merged"), "needs a token")
    assert "hf_wrong" not in err
    assert not any(request.method == "POST" and "create" in request.path for request in home_hub.requests)

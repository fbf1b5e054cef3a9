"""Finetunes with tokens of their own: rows are matched by tokens, and the output loads, speaks and can be checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
import yaml
from helpers.damage import edit_manifest
from helpers.launch import launch
from helpers.models import State, load, same_bits
from helpers.models import save as save_state
from helpers.runs import Killed, files_of, quick_merge
from helpers.vocabularies import TEMPLATE, family, model, save, tokenizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Model

from hf_locstitch import merge_from_hub, plan_merge, verify
from hf_locstitch.cli.main import main
from hf_locstitch.engine.shard_writer import ShardWriter
from hf_locstitch.errors import CheckpointError, MismatchError, RecipeError, RequestError
from hf_locstitch.plan.describe import format_plan, plan_json
from loopback_hub import LoopbackHub

MATRICES = ("model.embed_tokens.weight", "lm_head.weight")
NEW = ["<|tool|>", "<|im_end|>", "<|im_start|>", "sum"]  # chat's, before math's: by the names of the folders
DENSITY = {"density": 0.3}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return family(tmp_path_factory.mktemp("family"), tied=request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In bfloat16, with padded rows in the base: 24 tokens of 32."""
    return family(tmp_path_factory.mktemp("untied"), tied=False, rows={"base": 32}, dtype=torch.bfloat16)


def ids(folder: Path) -> dict[str, int]:
    return AutoTokenizer.from_pretrained(folder).get_vocab()


def rows_due(
    folders: Mapping[str, Path],
    vocabulary: Mapping[str, int],
    count: int,
    old: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    dtype: torch.dtype | None = None,
) -> State:
    """Each matrix of the output, row by row. old: a token's row in each model that has it -> its row in the output, if
    the base has it. dtype: the base's unless given."""
    states = {name: load(folder) for name, folder in folders.items()}
    known = {name: ids(folder) for name, folder in folders.items()}
    due: State = {}
    for matrix in [name for name in MATRICES if name in states["base"]]:
        base = states["base"][matrix]
        rows = [base[min(i, len(base) - 1)] for i in range(count)]
        for token, number in vocabulary.items():
            found = {name: states[name][matrix][own[token]] for name, own in known.items() if token in own}
            rows[number] = old(found) if "base" in found else mean(*found.values())
        due[matrix] = torch.stack([row.to(dtype or base.dtype) for row in rows])
    return due


def mean(*rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([row.float() for row in rows]).mean(0)


def base_row(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return found["base"]


def merged(folders: Mapping[str, Path], out: Path, **fields: Any) -> Path:
    quick_merge(folders["base"], [folders["math"], folders["chat"]], out=out, localizer=DENSITY, **fields)
    return out


def check(out: Path) -> None:
    report = verify(out, base=out.parent / "base", finetuned=[out.parent / "math", out.parent / "chat"], tensors="all")
    assert report.ok and not report.findings, report.describe()


def test_one_command_on_the_hub(
    either: dict[str, Path], home_hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged, loaded, spoken with: new tokens are generated, and the chat template that they are for is there."""
    org = f"v{uuid4().hex[:8]}"
    for name, folder in either.items():
        home_hub.add_repo(f"{org}/{name}", {path.name: path for path in folder.iterdir()})
    refs = ["--base", f"{org}/base", "--ft", f"{org}/math", f"{org}/chat"]
    assert main(["merge", *refs, "--out", str(tmp_path / "out"), "--push-to", f"lab/{org}", "--no-figures"]) == 0
    said = capsys.readouterr().err
    assert "24 tokens of the base, 1 added by chat, 1 added by chat and math (the mean of 2), 2 added by math" in said
    assert "→ 28 rows of" in said and "the chat template is that of math" in said
    out = tmp_path / "out"
    words = AutoTokenizer.from_pretrained(out)
    assert [words.convert_tokens_to_ids(token) for token in NEW] == [24, 25, 26, 27]
    assert words.convert_ids_to_tokens(list(range(24))) == tokenizer().convert_ids_to_tokens(list(range(24)))
    got = load(out)
    due = rows_due(either, words.get_vocab(), 28, base_row)
    assert same_bits({name: got[name] for name in due}, due)
    text = words.apply_chat_template([{"role": "user", "content": " w1 sum w2 "}], tokenize=False)
    assert text == "<|im_start|> w1 sum w2 <|im_end|>" and words.chat_template == TEMPLATE
    encoded = words(text, return_tensors="pt")
    assert encoded.input_ids[0].tolist() == [26, 4, 27, 5, 25]
    speaker = AutoModelForCausalLM.from_pretrained(out)
    assert speaker.get_input_embeddings().weight.shape[0] == speaker.config.vocab_size == 28
    said = speaker.generate(**encoded, max_new_tokens=3, do_sample=False)
    assert said.shape[1] == 8 and torch.isfinite(speaker(**encoded).logits).all()
    assert verify(f"lab/{org}").ok
    record = json.loads((out / "locstitch.json").read_text())["vocabulary"]
    assert [entry["token"] for entry in record["added"]] == NEW and record["added"][1]["from"] == ["chat", "math"]
    assert "28 rows" in (out / "README.md").read_text()
    assert (
        main(["merge", str(out / "locstitch.yaml"), "--out", str(tmp_path / "again"), "--no-figures", "--quiet"]) == 0
    )
    other = {file: digest for file, digest in files_of(out).items() if file != "README.md"}
    assert other == {file: digest for file, digest in files_of(tmp_path / "again").items() if file != "README.md"}


def test_the_order_of_arguments_changes_no_weight_and_no_token(either: dict[str, Path], tmp_path: Path) -> None:
    refs = [either["chat"], either["math"]]
    one = merged(either, tmp_path / "one")
    other = quick_merge(either["base"], refs, out=tmp_path / "other", localizer=DENSITY).out
    assert other is not None
    assert same_bits(load(one), load(other))
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        assert (one / file).read_bytes() == (other / file).read_bytes()


@pytest.mark.parametrize(
    ("asked", "old"),
    [
        ({"embeddings": "math"}, lambda found: found.get("math", found["base"])),
        ({"embeddings": "mean"}, lambda found: mean(found["chat"], found["math"]).bfloat16()),
        ({"embeddings": "base"}, base_row),
        ({}, base_row),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_rows_of_old_tokens(untied: dict[str, Path], tmp_path: Path, asked: dict[str, str], old: Any) -> None:
    """Also where the base's rows are padded: new tokens take rows of the padding, the others stay."""
    for name, folder in untied.items():
        shutil.copytree(folder, tmp_path / name)
    out = merged(untied, tmp_path / "out", **asked)
    due = rows_due(untied, ids(out), 32, old)
    if asked.get("embeddings") == "math":  # where it has the token
        rows = load(untied["math"])
        for matrix, theirs in rows.items():
            if matrix in due:
                due[matrix][25] = theirs[ids(untied["math"])["<|im_end|>"]]
    got = load(out)
    assert same_bits({name: got[name] for name in due}, due)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 32
    check(out)


@pytest.mark.parametrize("asked", [{"embeddings": "localize"}, {"method": "average"}, {"method": "ties"}], ids=str)
def test_methods_that_range_over_the_rows(untied: dict[str, Path], tmp_path: Path, asked: dict[str, str]) -> None:
    """They see every input in the output's rows: the same bytes as of finetunes that were saved in these rows."""
    for name, folder in untied.items():
        shutil.copytree(folder, tmp_path / name)
    options = {key: value for key, value in asked.items() if key == "method"}
    include = {} if options else {"include": ["model.layers.*", *MATRICES]}
    density = {} if options.get("method") == "average" else {"localizer": DENSITY}
    out = quick_merge(untied["base"], [untied["math"], untied["chat"]], out=tmp_path / "out", **density, **asked).out
    assert out is not None
    saved = []
    for name, folder in untied.items():
        own = lambda found, name=name: found.get(name, found["base"])  # noqa: E731
        rows = rows_due(untied, ids(out), 32, own, torch.float32)
        saved.append(save_state(tmp_path / f"aligned-{name}", {**load(folder), **rows}))
    plain = quick_merge(saved[0], saved[1:], out=tmp_path / "plain", **density, **options, **include).out
    assert plain is not None
    got, due = load(out), load(plain)
    assert same_bits(got, {name: value.to(got[name].dtype) for name, value in due.items()})
    if not options:
        check(out)


def test_a_tokenizer_of_a_finetune(untied: dict[str, Path], tmp_path: Path) -> None:
    """Its tokens, their order and its files; the base's rows stay the base's under their new ids."""
    words = tokenizer(["<s>", "</s>", "<unk>", *(f"w{i}" for i in reversed(range(21)))], special=["<|x|>"])
    other = model(25, tied=False, seed=3, dtype=torch.bfloat16)
    other.config.eos_token_id = other.generation_config.eos_token_id = 1  # type: ignore[union-attr]
    folders = {**untied, "chat": save(tmp_path / "turned", other, words, "{{ 1 }}")}
    out = merged(folders, tmp_path / "out", tokenizer="turned")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / file).read_bytes() == (folders["chat"] / file).read_bytes()
    due = rows_due({"base": untied["base"], "turned": folders["chat"]}, ids(out), 25, base_row)
    got = load(out)
    assert same_bits({name: got[name] for name in due}, due)
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (25, 1)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 1


def test_without_new_tokens_nothing_changes(untied: dict[str, Path], tmp_path: Path) -> None:
    """The base's tokens alone, as where the finetunes have no others: its rows, its files, byte for byte."""
    out = merged(untied, tmp_path / "out", tokenizer="base")
    same = {}
    for name, folder in untied.items():
        same[name] = shutil.copytree(folder, tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(untied["base"] / file, same[name] / file)
        (same[name] / "chat_template.jinja").unlink(missing_ok=True)
    due = merged(same, tmp_path / "due")
    skipped = {"README.md", "locstitch.yaml", "locstitch.json"}
    assert {f: d for f, d in files_of(out).items() if f not in skipped} == {
        f: d for f, d in files_of(due).items() if f not in skipped
    }
    assert (out / "tokenizer.json").read_bytes() == (untied["base"] / "tokenizer.json").read_bytes()
    assert not any("token" in line for line in json.loads((out / "locstitch.json").read_text())["warnings"])


@pytest.mark.parametrize("tokenizer", ["base", "math"])
def test_tokens_that_were_to_be_dropped_are_noted_once(tokenizer: str, untied: dict[str, Path]) -> None:
    """What was asked for is nothing to warn of, and does not stop a strict merge."""
    refs = {"base": str(untied["base"]), "finetuned": [str(untied["math"]), str(untied["chat"])]}
    kept = "the base" if tokenizer == "base" else tokenizer
    found = plan_merge({**refs, "tokenizer": tokenizer, "chat_template": tokenizer, "strict": True})
    assert found.warnings == ()
    said = [note for note in found.notes if "tokenizer" in note]
    chat = f"chat's tokenizer has 26 tokens, the base's 24; 2 more ('<|tool|>', '<|im_end|>'): {kept}'s is kept."
    assert said[-1] == chat and len(said) == (2 if tokenizer == "base" else 1)


def test_rows_that_are_only_padded(tmp_path: Path) -> None:
    """The same tokens, other numbers of rows: what was a mismatch is averaged row by row."""
    base = model(24, tied=False)
    padded = model(32, tied=False, seed=1, base=base)
    folders = [save(tmp_path / "base", base, tokenizer()), save(tmp_path / "padded", padded, tokenizer())]
    out = quick_merge(folders[0], folders[1:], out=tmp_path / "out", method="average").out
    assert out is not None
    got, theirs = load(out), load(folders[1])
    assert all(torch.equal(got[matrix], theirs[matrix][:24]) for matrix in MATRICES)


def test_padding_is_kept(tmp_path: Path) -> None:
    """31 tokens in 32 rows become 34 tokens in 64; the rows beyond are those beyond in the base."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(28))]
    base = model(32, tied=True)
    tuned = model(40, tied=True, seed=1, base=base)
    tuned_words = tokenizer(words, plain=[f"new{i}" for i in range(3)])
    folders = [save(tmp_path / "base", base, tokenizer(words)), save(tmp_path / "ft", tuned, tuned_words)]
    out = quick_merge(folders[0], folders[1:], out=tmp_path / "out", localizer=DENSITY).out
    assert out is not None
    got, own, theirs = (load(folder)[MATRICES[0]] for folder in (out, *folders))
    assert got.shape[0] == 64
    assert torch.equal(got[31:34], theirs[31:34]) and torch.equal(got[34:], own[-1:].expand(30, -1))


def test_the_template_ends_as_its_finetune_does(untied: dict[str, Path], tmp_path: Path) -> None:
    """Its end token under its id in the output, beside the base's own."""
    folders = {**untied, "math": shutil.copytree(untied["math"], tmp_path / "math")}
    generation = json.loads((folders["math"] / "generation_config.json").read_text())
    generation["eos_token_id"] = ids(folders["math"])["<|im_end|>"]
    (folders["math"] / "generation_config.json").write_text(json.dumps(generation))
    out = merged(folders, tmp_path / "out", chat_template="math")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, ids(out)["<|im_end|>"]]


def test_a_template_from_a_file(untied: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jinja").write_text("{{ messages[0].content }}!")
    out = merged(untied, tmp_path / "out", chat_template=str(tmp_path / "my.jinja"), tokenizer="math")
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages[0].content }}!"
    assert yaml.safe_load((out / "locstitch.yaml").read_text())["chat_template"] == "./my.jinja"
    with pytest.raises(RecipeError, match="neither base nor one of the finetunes"):
        merged(untied, tmp_path / "other", chat_template="./absent.jinja")
    with pytest.raises(MismatchError, match="has no chat template"):
        merged(untied, tmp_path / "other", chat_template="chat")
    plain = merged(untied, tmp_path / "plain", chat_template="base")
    assert AutoTokenizer.from_pretrained(plain).chat_template is None


def test_templates_inside_the_config_and_beside_it(untied: dict[str, Path], tmp_path: Path) -> None:
    folders = {name: shutil.copytree(folder, tmp_path / name) for name, folder in untied.items()}
    settings = json.loads((folders["chat"] / "tokenizer_config.json").read_text())
    (folders["chat"] / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ 2 }}"}))
    (folders["base"] / "chat_template.jinja").write_text("{{ 0 }}")
    (folders["base"] / "additional_chat_templates").mkdir()
    (folders["base"] / "additional_chat_templates" / "rag.jinja").write_text("{{ 9 }}")
    out = merged(folders, tmp_path / "out", chat_template="chat")
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ 2 }}"
    assert not list(out.rglob("*.jinja"))
    kept = merged(folders, tmp_path / "kept")
    assert (kept / "chat_template.jinja").read_text() == "{{ 0 }}" and (kept / "additional_chat_templates").is_dir()


def test_several_processes_streams_and_a_kill(
    untied: dict[str, Path], home_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    org = f"v{uuid4().hex[:8]}"
    for name, folder in untied.items():
        home_hub.add_repo(f"{org}/{name}", {path.name: path for path in folder.iterdir()})
    refs = [f"{org}/math", f"{org}/chat"]
    fields: dict[str, Any] = {"localizer": DENSITY}
    due = quick_merge(f"{org}/base", refs, out=tmp_path / "due", **fields).out
    assert due is not None
    streamed = quick_merge(f"{org}/base", refs, out=tmp_path / "streamed", cache=False, **fields).out
    assert streamed is not None and files_of(streamed) == files_of(due)
    done = launch(2, tmp_path, "--base", f"{org}/base", "--ft", *refs, "--density", "0.3", "--out", "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert files_of(tmp_path / "two") == files_of(due)
    write, killed = ShardWriter.write, []

    def kill(self: ShardWriter, *args: Any) -> Any:
        if len(killed) == 0 and args[0].file.startswith("model-00002"):
            killed.append(args[0].file)
            raise Killed
        return write(self, *args)

    monkeypatch.setattr(ShardWriter, "write", kill)
    sharded = {**fields, "shard_size": "1KB"}
    with pytest.raises(Killed):
        quick_merge(f"{org}/base", refs, out=tmp_path / "resumed", **sharded)
    resumed = quick_merge(f"{org}/base", refs, out=tmp_path / "resumed", **sharded).out
    assert resumed is not None and killed
    assert same_bits(load(resumed), load(due))


def test_verify_finds_a_wrong_row(untied: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in untied.items():
        shutil.copytree(folder, tmp_path / name)
    out = merged(untied, tmp_path / "out")
    state = load(out)
    state["lm_head.weight"][26, 3] += 1
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    report = verify(out, base=untied["base"], finetuned=[untied["math"], untied["chat"]])
    assert any(finding.where == "lm_head.weight" and "[26, 3]" in finding.what for finding in report.findings)


def test_verify_tells_of_another_vocabulary_in_a_few_words(untied: dict[str, Path], tmp_path: Path) -> None:
    out = merged(untied, tmp_path / "out")
    finetuned = [untied["math"], untied["chat"]]

    def told() -> list[str]:
        found = verify(out, base=untied["base"], finetuned=finetuned).findings
        return [str(finding) for finding in found if "vocabulary" in finding.what]

    assert told() == []
    more = [{"token": f"<new {number}>", "id": number, "from": ["math"]} for number in range(5000)]

    def change(record: dict[str, Any]) -> None:
        record["vocabulary"]["tokens"] = 5028
        record["vocabulary"]["added"] = [*more, *record["vocabulary"]["added"][1:]]

    edit_manifest(out, change)
    added, tokens = told()
    assert "vocabulary.added is 5,003 entries (5,000 of them only here: " in added and '"<new 2>"' in added
    assert "expected 4 entries (1 of them only here: " in added and "<new 3>" not in added and len(added) < 500
    assert tokens == "locstitch.json: vocabulary.tokens is 5028, expected 28"
    edit_manifest(out, lambda record: record.update(vocabulary=None))
    (absent,) = told()
    assert absent.startswith("locstitch.json: vocabulary is absent, expected 24 tokens of the base, 1 added by chat")


Edit = Callable[[dict[str, Any]], object]


def entry(token: str, number: Any) -> dict[str, Any]:
    return {"id": number, "content": token, "special": True}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (None, "not a tokenizer that can be read"),
        (lambda t: t["added_tokens"].append(entry("new", -1)), "is -1, no whole number"),
        (lambda t: t["added_tokens"].append(entry("new", 1 << 40)), "no whole number"),
        (lambda t: t["added_tokens"].append(entry("new", 26.5)), "no whole number"),
        (lambda t: t["added_tokens"].append(entry("new", True)), "no whole number"),
        (lambda t: t["added_tokens"].append(entry("new", 3)), "share the id 3"),
        (lambda t: t["added_tokens"].append(entry("w1", 30)), "has the ids 4 and 30"),
        (lambda t: t["added_tokens"].append(t["added_tokens"][0]), "added twice"),
        (lambda t: t["added_tokens"].append("new"), "must be a list of tokens"),
        (lambda t: t["model"].pop("vocab"), "'vocab' is missing"),
        (lambda t: t["model"].update(vocab=3), "must hold the tokens"),
        (lambda t: t["added_tokens"].append(entry("new", 1 << 20)), "but its embeddings have 27 rows"),
    ],
)  # fmt: skip
def test_hostile_tokenizers(untied: dict[str, Path], tmp_path: Path, edit: Edit | None, said: str) -> None:
    folders = {**untied, "math": shutil.copytree(untied["math"], tmp_path / "math")}
    file = folders["math"] / "tokenizer.json"
    content = json.loads(file.read_text())
    if edit is not None:
        edit(content)
    file.write_text(json.dumps(content) if edit is not None else "[" * 100_000)
    with pytest.raises(RequestError, match=said):
        merged(folders, tmp_path / "out", tokenizer="union")
    assert not list(tmp_path.glob("*out*"))
    merged(folders, tmp_path / "out", tokenizer="base")  # which needs none of the finetunes' tokens


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("added_tokens_decoder", None, None),
        ("added_tokens_decoder", [1], r"in base/tokenizer_config\.json must be an object, but is \[1\]"),
        ("additional_special_tokens", None, None),
        ("additional_special_tokens", "x", 'additional_special_tokens in .* must be a list, but is "x"'),
        ("extra_special_tokens", {"image_token": "w1"}, None),
        ("extra_special_tokens", 3, "extra_special_tokens in .* must be a list, but is 3"),
    ],
    ids=str,
)  # fmt: skip
def test_hostile_settings_of_the_bases_tokenizer(
    untied: dict[str, Path], tmp_path: Path, key: str, value: Any, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(untied["base"], tmp_path / "base")
    folders = {**untied, "base": Path("base")}
    listed = key if key != "added_tokens_decoder" else "additional_special_tokens"
    for name in ("math", "chat"):
        folders[name] = shutil.copytree(untied[name], tmp_path / name)
        theirs = json.loads((folders[name] / "tokenizer_config.json").read_text())
        for one in ("additional_special_tokens", "extra_special_tokens"):
            theirs.pop(one, None)
        theirs[listed] = ["<|im_end|>"]
        (folders[name] / "tokenizer_config.json").write_text(json.dumps(theirs))
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    for one in ("additional_special_tokens", "extra_special_tokens"):
        settings.pop(one, None)
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({**settings, key: value}))
    if said is not None:
        with pytest.raises(CheckpointError, match=said):
            merged(folders, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    out = merged(folders, tmp_path / "out")
    got = json.loads((out / "tokenizer_config.json").read_text())
    assert "<|im_end|>" in [*(got.get("additional_special_tokens") or ()), *(got.get("extra_special_tokens") or ())]
    assert not isinstance(value, dict) or got[key] == value
    AutoTokenizer.from_pretrained(out)


def test_a_model_of_several_vocabularies(untied: dict[str, Path], tmp_path: Path) -> None:
    """Such as an encoder's and a decoder's: merged with the base's rows, of which no choice can be made."""
    folders = {name: shutil.copytree(folder, tmp_path / name) for name, folder in untied.items()}
    for folder in folders.values():
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "talker_config": {"vocab_size": 9}}))
        state = {**load(folder), "talker.embed_tokens.weight": torch.ones(9, 8)}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="are of several vocabularies"):
        merged(folders, tmp_path / "out", tokenizer="union")
    out = merged(folders, tmp_path / "out")
    got, base = load(out), load(folders["base"])
    assert all(torch.equal(got[name], base[name]) for name in (*MATRICES, "talker.embed_tokens.weight"))
    assert any("3 more" in line for line in json.loads((out / "locstitch.json").read_text())["warnings"])


@pytest.mark.parametrize("size", [[24], {"text": 24}, "24", None, True])
def test_sizes_that_are_no_numbers(untied: dict[str, Path], tmp_path: Path, size: Any) -> None:
    """They are left as they are; the config's own size follows."""
    folders = {**untied, "base": shutil.copytree(untied["base"], tmp_path / "base")}
    config = json.loads((untied["base"] / "config.json").read_text())
    state = {name: value[:24].clone() if name in MATRICES else value for name, value in load(untied["base"]).items()}
    save_file(state, folders["base"] / "model.safetensors", metadata={"format": "pt"})
    config = {**config, "vocab_size": 24, "text_config": {"vocab_size": size}}
    (folders["base"] / "config.json").write_text(json.dumps(config))
    got = json.loads((merged(folders, tmp_path / "out") / "config.json").read_text())
    assert (got["vocab_size"], got["text_config"]) == (28, {"vocab_size": size})


def test_names_that_are_no_choice_and_choices_that_exclude_one_another(untied: dict[str, Path], tmp_path: Path) -> None:
    for field in ("tokenizer", "embeddings"):
        with pytest.raises(MismatchError, match="one of the finetunes"):
            merged(untied, tmp_path / "out", **{field: "mth"})
    with pytest.raises(RecipeError, match="cannot be combined with rest_from"):
        merged(untied, tmp_path / "out", rest_from="math", tokenizer="union")
    with pytest.raises(RecipeError, match="--no-cache"):
        merged(untied, tmp_path / "out", embeddings="localize", cache=False)


def test_tokens_of_the_tokenizer_itself(untied: dict[str, Path], tmp_path: Path) -> None:
    """They cannot be added to another tokenizer: said, or refused where they were asked for."""
    own = tokenizer([*(f"w{i}" for i in range(30))])
    folders = {**untied, "math": save(tmp_path / "math", model(30, tied=False, dtype=torch.bfloat16), own)}
    with pytest.raises(MismatchError, match="no rules for them; use --tokenizer math"):
        merged(folders, tmp_path / "out", tokenizer="union")
    out = merged(folders, tmp_path / "out")
    assert any("are lost" in line for line in json.loads((out / "locstitch.json").read_text())["warnings"])


def test_a_base_whose_tokens_are_not_known(untied: dict[str, Path], tmp_path: Path) -> None:
    folders = {**untied, "base": shutil.copytree(untied["base"], tmp_path / "base")}
    (folders["base"] / "tokenizer.json").rename(folders["base"] / "tokenizer.model")
    merged(folders, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor vocab\.json"):
        merge_from_hub(folders["base"], [folders["math"]], out=tmp_path / "other", tokenizer="union")


def test_a_tied_head_that_only_the_base_stores(tmp_path: Path) -> None:
    """A finetune's new rows of the head are those of its embedding."""
    folders = family(tmp_path / "in", tied=True)
    state = load(folders["base"])
    save_file({**state, MATRICES[1]: state[MATRICES[0]].clone()}, folders["base"] / "model.safetensors")
    out = quick_merge(folders["base"], [folders["math"]], out=tmp_path / "out", localizer=DENSITY).out
    assert out is not None
    got = load(out)
    assert torch.equal(got[MATRICES[0]], got[MATRICES[1]])
    assert verify(out, base=folders["base"], finetuned=[folders["math"]]).ok


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "by default"])
def test_a_head_that_is_not_stored_and_not_tied(tmp_path: Path, stated: bool) -> None:
    """Its rows are nowhere: those of the embedding are another thing."""
    folders = family(tmp_path / "in", tied=False)
    state = load(folders["math"])
    del state[MATRICES[1]]
    save_file(state, folders["math"] / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folders["math"] / "config.json").read_text())
    if stated:
        config["tie_word_embeddings"] = False
    else:
        config.pop("tie_word_embeddings", None)
    (folders["math"] / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match=r"math has no lm_head\.weight of the base's width"):
        quick_merge(folders["base"], [folders["math"]], out=tmp_path / "out", localizer=DENSITY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_with_a_prefix(untied: dict[str, Path], tmp_path: Path, prefix: str) -> None:
    """Embeddings are known by it, too, though they have other numbers of rows."""
    folders = {**untied, "math": shutil.copytree(untied["math"], tmp_path / "math")}
    state = {f"{prefix}{name}": value for name, value in load(untied["math"]).items()}
    save_file(state, folders["math"] / "model.safetensors", metadata={"format": "pt"})
    out, due = merged(folders, tmp_path / "out"), merged(untied, tmp_path / "due")
    assert same_bits(load(out), load(due))
    assert (out / "tokenizer.json").read_bytes() == (due / "tokenizer.json").read_bytes()


def test_a_headless_base_under_heads_with_more_tokens(tmp_path: Path) -> None:
    size = {"n_embd": 8, "n_layer": 2, "n_head": 2}
    words = tokenizer(special=["<|a|>"])
    folders = {"base": tmp_path / "base", "ft": tmp_path / "ft"}
    GPT2Model(GPT2Config(vocab_size=24, **size)).save_pretrained(folders["base"])
    GPT2LMHeadModel(GPT2Config(vocab_size=25, **size)).save_pretrained(folders["ft"])
    tokenizer().save_pretrained(folders["base"])
    words.save_pretrained(folders["ft"])
    out = quick_merge(folders["base"], [folders["ft"]], out=tmp_path / "out", localizer=DENSITY).out
    assert out is not None
    assert ids(out) == words.get_vocab()
    got, theirs = load(out)["wte.weight"], load(folders["ft"])["transformer.wte.weight"]
    assert got.shape == (25, 8) and torch.equal(got[24], theirs[24])
    assert verify(out, base=folders["base"], finetuned=[folders["ft"]], tensors="all").ok


def test_tokenizers_of_two_files(untied: dict[str, Path], tmp_path: Path) -> None:
    """vocab.json and added_tokens.json, without tokenizer.json."""
    folders = {name: shutil.copytree(folder, tmp_path / name) for name, folder in untied.items()}
    for folder in folders.values():
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
        added = {entry["content"]: entry["id"] for entry in content["added_tokens"] if entry["id"] >= 24}
        (folder / "added_tokens.json").write_text(json.dumps(added))
    out = merged(folders, tmp_path / "out")
    assert same_bits(load(out), load(merged(untied, tmp_path / "fast")))
    assert json.loads((out / "added_tokens.json").read_text()) == dict(zip(NEW, range(24, 28), strict=True))
    decoder = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert [decoder[str(number)]["content"] for number in range(24, 28)] == NEW


def test_rows_that_an_adapter_adds_are_not_taken(untied: dict[str, Path], tmp_path: Path) -> None:
    import peft

    base = model(24, tied=False)
    folder = save(tmp_path / "base", base, tokenizer())
    base.resize_token_embeddings(27, mean_resizing=False)
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    shutil.copy(untied["math"] / "tokenizer.json", tmp_path / "lora")
    with pytest.raises(MismatchError, match=r"rows that an adapter adds are not taken; merge the adapter first"):
        quick_merge(folder, tmp_path / "lora", out=tmp_path / "out", tokenizer="union")
    out = quick_merge(folder, tmp_path / "lora", out=tmp_path / "out").out
    assert out is not None
    assert any(
        "merge the adapter first" in line for line in json.loads((out / "locstitch.json").read_text())["warnings"]
    )


def test_vocab_size_of_a_part(untied: dict[str, Path], tmp_path: Path) -> None:
    folders = {name: shutil.copytree(folder, tmp_path / name) for name, folder in untied.items()}
    for folder in folders.values():
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] = {"vocab_size": config.pop("vocab_size")}
        (folder / "config.json").write_text(json.dumps(config))
    folders["base"] = shutil.copytree(folders["base"], tmp_path / "small")
    state = {n: v[:24].clone() if n in MATRICES else v for n, v in load(folders["base"]).items()}
    config = json.loads((folders["base"] / "config.json").read_text())
    shutil.copytree(folders["base"], tmp_path / "texts", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    shutil.rmtree(folders["base"])
    save_state(folders["base"], state, json.dumps({**config, "text_config": {"vocab_size": 24}}))
    shutil.copytree(tmp_path / "texts", folders["base"], dirs_exist_ok=True)
    out = merged(folders, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["text_config"]["vocab_size"] == 28


def warned(folders: Mapping[str, Path], **fields: Any) -> list[str]:
    request = {"base": str(folders["base"]), "finetuned": [str(folders["math"]), str(folders["chat"])], **fields}
    return list(plan_merge(request).warnings)


def test_a_template_is_spoken_of_once_and_not_at_all_where_it_was_asked_for(
    untied: dict[str, Path], tmp_path: Path
) -> None:
    """Also of the tokens that end its answers."""
    folders = {**untied, "math": shutil.copytree(untied["math"], tmp_path / "math")}
    for file in ("config.json", "generation_config.json"):
        fields = json.loads((folders["math"] / file).read_text())
        fields["eos_token_id"] = ids(folders["math"])["<|im_end|>"]
        (folders["math"] / file).write_text(json.dumps(fields))
    (said,) = warned(folders)
    assert said == "the chat template is that of math, whose tokens are added; the base has none."
    assert warned(folders, chat_template="math") == []
    assert any("math ends its texts with the token 25" in line for line in warned(folders, chat_template="base"))
    assert not [line for line in warned(folders, tokenizer="math") if "template" in line or line.startswith("math")]
    recipe = {"base": str(folders["base"]), "finetuned": [str(folders["math"]), str(folders["chat"])]}
    plan = plan_merge({**recipe, "chat_template": "math", "strict": True})
    assert "note       answers end with the tokens [25], too" in format_plan(plan)
    (folders["math"] / "chat_template.jinja").unlink()
    assert not [line for line in warned(folders, chat_template="base", tokenizer="base") if "template" in line]


def test_tokens_under_other_ids_are_no_warning(untied: dict[str, Path], tmp_path: Path) -> None:
    words = tokenizer(["<s>", "</s>", "<unk>", *(f"w{i}" for i in reversed(range(21)))], special=["<|x|>"])
    turned = save(tmp_path / "turned", model(25, tied=False, seed=3, dtype=torch.bfloat16), words)
    said = "turned has 23 of the base's tokens under other ids, such as '<unk>' (2, in the base 0): rows are matched"
    plan = plan_merge({"base": str(untied["base"]), "finetuned": [str(turned)]})
    assert [note for note in plan.notes if note.startswith(said)] == list(plan.notes) != []
    assert not [line for line in plan.warnings if "other ids" in line]
    assert plan_json(plan)["notes"] == list(plan.notes) and f"note       {said}" in format_plan(plan)


@pytest.mark.parametrize("word", ["union", "mean", "localize", "Union", "base"])
def test_a_finetune_with_the_name_of_a_choice(word: str, tmp_path: Path) -> None:
    """It would be taken for the choice, and its rows for those of other tokens."""
    folders = family(tmp_path, tied=True)
    with pytest.raises(RecipeError, match=f"is named '{word}'.*Name all finetunes: --names model"):
        plan_merge({"base": str(folders["base"]), "finetuned": [{"ref": str(folders["math"]), "name": word}]})

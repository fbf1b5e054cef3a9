"""Mistakes that newcomers make, as they type them, and the answers: tests/cli/mistakes.txt is what is printed.

`LOCSTITCH_WRITE_TRANSCRIPT=1 pytest tests/cli/test_mistakes.py` writes the file anew.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers.models import finetune, random_state, save
from huggingface_hub import constants
from safetensors.torch import save_file

from hf_locstitch.checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hf_locstitch.cli.main import main
from loopback_hub import LoopbackHub

TRANSCRIPT = Path(__file__).with_name("mistakes.txt")
LLAMA = '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 6, "num_hidden_layers": 2}'
MERGE = "hf-locstitch merge --base base --ft math code"


@dataclass(frozen=True)
class Mistake:
    """typed: a command line. said: what its answer must hold, such as what to type next. environment: set for it; None
    unsets a variable."""

    name: str
    typed: str
    said: tuple[str, ...]
    environment: Mapping[str, str | None] = field(default_factory=dict)


MISTAKES = [
    Mistake("a misspelt flag", f"{MERGE} --densty 0.05 --out merged", ("--density", "hf-locstitch merge --help")),
    Mistake(
        "base and finetune swapped",
        "hf-locstitch merge --base shop/math --ft shop/start shop/code --out merged",
        ("--base shop/start --ft shop/math shop/code",),
    ),
    Mistake(
        "wrong repos",
        "hf-locstitch merge --base shop/strat --ft shop/maths shop/code --out merged",
        ("shop/strat ", "shop/maths ", "hf auth login"),
    ),
    Mistake("no token", f"{MERGE} --push-to demo/merged", ("hf auth login", "HF_TOKEN"), {"HF_TOKEN": None}),
    Mistake(
        "a token that may only read",
        f"{MERGE} --push-to demo/merged",
        ("settings/tokens", "--out"),
        {"HF_TOKEN": "hf_reader"},
    ),
    Mistake("a percentage as density", f"{MERGE} --density 5 --out merged", ("5 % is 0.05",)),
    Mistake("a per cent sign", f"{MERGE} --density 10% --out merged", ("--density: '10%'", "Did you mean 0.1?")),
    Mistake("a decimal comma", f"{MERGE} --scale 0,5 --out merged", ("--scale: '0,5'", "Did you mean 0.5?")),
    Mistake("a density that keeps nothing", f"{MERGE} --density 1e-12 --out merged", ("keeps none of", "such as 0.1")),
    Mistake("equal names", "hf-locstitch merge --base base --ft math old/math --out merged", ("--names",)),
    Mistake("an output folder that exists", f"{MERGE} --out taken", ("--out",)),
    Mistake("no output", MERGE, ("--out DIR", "--push-to ORG/NAME")),
    Mistake("typos in a recipe", "hf-locstitch merge typos.yaml --out merged", ("'finetuned'", "'density'")),
    Mistake(
        "data with other columns",
        "hf-locstitch merge --base llama --ft llama-math --localizer saliency --data questions.jsonl --out merged",
        ("question, reply", "columns: {prompt: question, completion: reply}"),
    ),
    Mistake(
        "a chat template that is not there", f"{MERGE} --chat-template chatml.jinja --out merged", ("chatml.jinja",)
    ),
    Mistake(
        "a model without a tokenizer",
        "hf-locstitch merge --base bare --ft bare-math --localizer saliency --data texts.jsonl --out merged",
        ("tokenizer.json",),
    ),
    Mistake(
        "cuda without a GPU",
        "hf-locstitch merge --base llama --ft llama-math --localizer saliency --data texts.jsonl --device cuda "
        "--out merged",
        ("--device cpu",),
    ),
    Mistake(
        "offline, and not in the cache",
        "hf-locstitch merge --base shop/new --ft shop/newer --out merged",
        ("HF_HUB_OFFLINE", "hf download ORG/NAME"),
        {"HF_HUB_OFFLINE": "1"},
    ),
    Mistake("a misspelt suite", "hf-locstitch evaluate merged --suite papper", ("Did you mean paper?",)),
    Mistake("a wrong list of lambdas", "hf-locstitch merge lambdas.yaml --out merged", ("stitch.lambdas", "[0.1, 1]")),
    Mistake(
        "finetunes of two bases",
        "hf-locstitch merge --base shop/start --ft shop/math shop/stranger --out merged",
        ("shop/other",),
    ),
    Mistake("adapters without a base", "hf-locstitch merge --ft lora-math lora-code --out merged", ("--base REF",)),
    Mistake("a file of mergekit's", "hf-locstitch merge mergekit.yml --out merged", ("nearswap", "method:")),
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the command lines name, where nothing is written."""
    folder = tmp_path_factory.mktemp("shop")
    base = random_state(0)
    for number, name in enumerate(("math", "code", "old/math", "taken")):
        save(folder / name, finetune(base, number))
    save(folder / "base", base)
    save(folder / "stranger", {name: torch.randn(12, 12) if len(t.shape) > 1 else t for name, t in base.items()})
    for name in ("llama", "bare"):
        save(folder / name, base, LLAMA)
        save(folder / f"{name}-math", finetune(base, 1), LLAMA)
    (folder / "llama" / "tokenizer.json").write_text("{}")
    for name in ("lora-math", "lora-code"):
        (folder / name).mkdir()
        save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 6)}, folder / name / ADAPTER_WEIGHTS)
        (folder / name / ADAPTER_CONFIG).write_text(
            '{"peft_type": "LORA", "base_model_name_or_path": "/home/ana/llama"}'
        )
    (folder / "questions.jsonl").write_text('{"question": "2 + 2?", "reply": "4"}\n')
    (folder / "texts.jsonl").write_text('{"text": "two and two are four"}\n')
    (folder / "typos.yaml").write_text("base: base\nfinetune: [math, code]\nlocalizer: {densty: 0.05}\n")
    (folder / "lambdas.yaml").write_text(
        'base: llama\nfinetuned: [llama-math]\ndata: [texts.jsonl]\nstitch: {lambdas: "0.1 1"}\n'
    )
    (folder / "mergekit.yml").write_text("merge_method: nearswap\nbase_model: ./base\nmodels: [{model: ./math}]\n")
    return folder


def add_shop(hub: LoopbackHub, folder: Path) -> None:
    """The shop's repos on the Hub."""
    for name, made_from in {
        "start": None,
        "math": "shop/start",
        "code": "shop/start",
        "stranger": "shop/other",
    }.items():
        files = {file.name: file for file in (folder / (name if made_from else "base")).iterdir()}
        card = f"---\nbase_model: {made_from}\n---\n" if made_from else "---\nlicense: mit\n---\n"
        hub.add_repo(f"shop/{name}", {**files, "README.md": card})


@contextmanager
def surroundings(mistake: Mistake) -> Iterator[None]:
    """Its environment; the Hub's client has read one variable of it already."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mistake.environment.items():
            patch.delenv(name) if value is None else patch.setenv(name, value)
        patch.setattr(constants, "HF_HUB_OFFLINE", "HF_HUB_OFFLINE" in mistake.environment)
        yield


def typed(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Status, standard output and standard error of a command line."""
    try:
        status = main(shlex.split(line)[1:])
    except SystemExit as end:
        status = int(end.code or 0)
    return status, *capsys.readouterr()


def test_mistakes_are_answered_with_what_to_type(
    shop: Path, home_hub: LoopbackHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is answered before any work, in one paragraph that says what to type next, and nothing is written."""
    add_shop(home_hub, shop)
    monkeypatch.chdir(shop)
    monkeypatch.setattr(home_hub._rights, "users", {**home_hub._rights.users, "hf_reader": "demo"})
    monkeypatch.setattr(home_hub, "read_tokens", ["hf_reader"])
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    before = sorted(shop.rglob("*"))
    transcript = []
    for mistake in MISTAKES:
        with surroundings(mistake):
            status, out, err = typed(mistake.typed, capsys)
        assert (status, out) == (2, ""), f"{mistake.name}: {err}"
        assert err.startswith("hf-locstitch: error: ") and err.count("\n") == 1, f"{mistake.name}: {err}"
        assert all(said in err for said in mistake.said), f"{mistake.name}: {err}"
        assert sorted(shop.rglob("*")) == before, mistake.name
        transcript.append(f"# {mistake.name}\n$ {prefix(mistake)}{mistake.typed}\n{told(err, home_hub)}")
    assert not any(request.method == "POST" for request in home_hub.requests)
    check("\n".join(transcript))


def told(answer: str, hub: LoopbackHub) -> str:
    """An answer, without what differs from run to run."""
    answer = re.sub(r"@[0-9a-f]{7,40}\b", "@COMMIT", answer.replace(hub.endpoint, "https://hub"))
    return re.sub(r"torch \d\S*", "torch VERSION", answer)


def prefix(mistake: Mistake) -> str:
    return "".join(f"{name}={value or ''} " for name, value in mistake.environment.items())


def check(transcript: str) -> None:
    if os.environ.get("LOCSTITCH_WRITE_TRANSCRIPT"):
        TRANSCRIPT.write_text(transcript, encoding="utf-8")
    assert transcript == TRANSCRIPT.read_text(encoding="utf-8")

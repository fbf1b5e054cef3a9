"""Twenty mistakes that newcomers make, as they type them, and the answers: tests/cli/mistakes.txt is what is printed.

`LOCSTITCH_WRITE_TRANSCRIPT=1 pytest tests/cli/test_mistakes.py` writes the file anew.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers.adapters import LLAMA, save_lora
from helpers.adapters import save_base as save_llama
from helpers.models import finetune, random_state, save
from huggingface_hub import constants

from hf_locstitch.cli.main import main
from loopback_hub import LoopbackHub

TRANSCRIPT = Path(__file__).with_name("mistakes.txt")
HUB = "https://hub"  # what the transcript calls the loopback Hub
MERGE = "hf-locstitch merge --base base --ft math code"


@dataclass(frozen=True)
class Mistake:
    """typed: a command line. said: what its answer must hold: what to type next. environment: set for it, None unsets.

    status: what it returns.
    """

    name: str
    typed: str
    said: tuple[str, ...]
    environment: Mapping[str, str | None] = field(default_factory=dict)
    status: int = 2


MISTAKES = [
    Mistake("a misspelt flag", f"{MERGE} --densty 0.05 --out merged", ("--density", "hf-locstitch merge --help")),
    Mistake(
        "base and finetune swapped",
        "hf-locstitch merge --base shop/math --ft shop/base shop/code --out merged",
        ("--base shop/base",),
    ),
    Mistake(
        "wrong repos",
        "hf-locstitch merge --base shop/bas --ft shop/maths shop/code --out merged",
        ("shop/bas ", "shop/maths ", "hf auth login"),
    ),
    Mistake("no token", f"{MERGE} --push-to demo/merged", ("hf auth login", "HF_TOKEN"), {"HF_TOKEN": None}),
    Mistake(
        "a token that may only read",
        f"{MERGE} --push-to demo/merged",
        ("settings/tokens", "--out"),
        {"HF_TOKEN": "hf_reader"},
    ),
    Mistake("a percentage as density", f"{MERGE} --density 5 --out merged", ("5 % is 0.05",)),
    Mistake("equal names", "hf-locstitch merge --base base --ft math old/math --out merged", ("--names",)),
    Mistake("an output folder that exists", f"{MERGE} --out taken", ("--out",)),
    Mistake("no output", MERGE, ("--out DIR", "--push-to ORG/NAME")),
    Mistake("typos in a recipe", "hf-locstitch merge typos.yaml --out merged", ("'finetuned'", "'density'")),
    Mistake(
        "data with other columns",
        "hf-locstitch merge --base llama --ft llama-math --localizer saliency --data questions.jsonl --out merged",
        ("question, reply", "columns: {prompt: question, completion: reply}"),
    ),
    Mistake("a chat template that is not there", f"{MERGE} --chat-template chatml.jinja --out merged", ("chatml.jinja",)),
    Mistake(
        "a model without a tokenizer",
        "hf-locstitch merge --base llama --ft llama-math --localizer saliency --data texts.jsonl --out merged",
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
        "hf-locstitch merge --base shop/base --ft shop/math --out merged",
        ("HF_HUB_OFFLINE", "hf download shop/base"),
        {"HF_HUB_OFFLINE": "1"},
    ),
    Mistake("a misspelt suite", "hf-locstitch evaluate merged --suite papper", ("Did you mean paper?",)),
    Mistake("a wrong list of lambdas", "hf-locstitch merge lambdas.yaml --out merged", ("stitch.lambdas", "[0.1, 1]")),
    Mistake(
        "finetunes of two bases",
        "hf-locstitch merge --base shop/base --ft shop/math shop/stranger --out merged",
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
    save_llama(folder / "llama")
    save_llama(folder / "llama-math", **{**LLAMA, "initializer_range": 0.03})
    for seed, name in enumerate(("lora-math", "lora-code")):
        save_lora(folder / name, folder / "llama", seed)
        settings = json.loads((folder / name / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = "/home/ana/llama"
        (folder / name / "adapter_config.json").write_text(json.dumps(settings))
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
    for name, made_from in {"base": None, "math": "shop/base", "code": "shop/base", "stranger": "shop/other"}.items():
        files = {file.name: file for file in (folder / name).iterdir()}
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


def test_twenty_mistakes(
    shop: Path, home_hub: LoopbackHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is answered before any work, in one paragraph that says what to type next."""
    add_shop(home_hub, shop)
    monkeypatch.chdir(shop)
    monkeypatch.setattr(home_hub._rights, "users", {**home_hub._rights.users, "hf_reader": "demo"})
    monkeypatch.setattr(home_hub, "read_tokens", ["hf_reader"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = sorted(shop.rglob("*"))
    answers = []
    for mistake in MISTAKES:
        home_hub.requests.clear()
        with surroundings(mistake):
            status, out, err = typed(mistake.typed, capsys)
        err = err.replace(home_hub.endpoint, HUB)
        answers.append(f"# {mistake.name}\n$ {prefix(mistake)}{mistake.typed}\n{err}")
    write_or_compare("\n".join(answers))
    print("\n".join(answers))


def prefix(mistake: Mistake) -> str:
    return "".join(f"{name}={value or ''} " for name, value in mistake.environment.items())


def write_or_compare(transcript: str) -> None:
    if os.environ.get("LOCSTITCH_WRITE_TRANSCRIPT"):
        TRANSCRIPT.write_text(transcript, encoding="utf-8")
    assert transcript == TRANSCRIPT.read_text(encoding="utf-8")

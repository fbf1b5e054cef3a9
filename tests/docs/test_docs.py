"""The documentation: what it shows runs, what it lists is complete."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from hf_locstitch import Magnitude, errors, load_mask, merge_from_hub
from hf_locstitch.cli.arguments import build_parser
from hf_locstitch.cli.main import COMMANDS
from hf_locstitch.localize.localizers import LOCALIZERS
from hf_locstitch.plan.mergekit.config import MergekitConfig, is_mergekit
from hf_locstitch.plan.mergekit.layers import layout_of
from hf_locstitch.plan.mergekit.methods import KNOWN, REFUSED, TRANSLATED
from hf_locstitch.plan.mergekit.translate import translate
from hf_locstitch.plan.recipe import Recipe, make_recipe
from hf_locstitch.stitch.methods import METHODS
from hf_locstitch.stitch.stitchers import STITCHERS
from hf_locstitch.tasks.named_tasks import named_tasks
from hf_locstitch.tasks.objective import Training
from hf_locstitch.tasks.objectives import OBJECTIVES
from hf_locstitch.tasks.surrogates import SURROGATES
from hf_locstitch.training.request import FinetuneRequest, make_request

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def of_all(language: str) -> Iterator[Any]:
    for page in PAGES:
        for number, block in enumerate(blocks(page, language)):
            yield pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")


def save(folder: Path, seed: int, base: Path | None = None) -> Path:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.layers.0.up.weight": (40, 30), "model.layers.1.norm.weight": (30,), "lm_head.weight": (7, 30)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "toy"}')
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "reverse", "swap")):
        save(tmp_path / name, seed)
    return tmp_path


def test_readme_is_one_page_and_begins_with_the_two_commands() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    commands = [line.split("#")[0].strip() for block in blocks(README, "bash") for line in block.splitlines()]
    assert commands[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    made = {DOCS / path for path in generated()}
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        assert path.exists() or path in made, target


def test_every_page_is_in_the_navigation_and_the_table_of_pages() -> None:
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES if page != README} | {*generated()}
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    table = (DOCS / "index.md").read_text(encoding="utf-8")
    assert {*re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)} == pages
    assert pages - {"index.md"} <= {*re.findall(r"\]\(([^)#]+\.md)", table)}


def test_the_layout_has_every_package() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The layout")[1].split("\n## ")[0]
    packages = {file.parent.name for file in (ROOT / "hf_locstitch").glob("*/__init__.py")}
    assert packages == {*re.findall(r"`(\w+)/`", "".join(re.findall(r"^\|(.*?)\|", table, re.MULTILINE)))}


@pytest.mark.parametrize("block", of_all("bash"))
def test_commands_have_flags_that_exist(block: str) -> None:
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "torchrun":
            words = ["hf-locstitch", *words[words.index("hf_locstitch") + 1 :]]
        if words and words[0] == "hf-locstitch":
            assert words[1] in COMMANDS
            own = [word if word != "relative" else "magnitude" for word in words[1:]]  # a name of the page's own
            build_parser().parse_args(own)


@pytest.mark.parametrize("block", of_all("yaml"))
def test_recipes_are_valid(block: str) -> None:
    fields = yaml.safe_load(block)
    if is_mergekit(fields):
        fields = translate(fields, "the page", lambda _: layout_of(["h.0.w", "h.1.w"])).fields
    if "kind: regression" in block:  # an objective of the page's own
        return
    names = list(fields["data"]) if isinstance(fields.get("data"), dict) else ["math", "coding"]
    finetuned = [{"ref": f"org/{name}", "name": name} for name in names]
    merged = {} if "localized" in fields else {"finetuned": finetuned}
    make_recipe({"base": "org/base", **merged, **fields})


def test_recipes_of_finetunes_are_valid() -> None:
    (recipe,) = re.findall(
        r"^```yaml title=\"finetune.yaml\"\n(.*?)^```",
        (DOCS / "guides" / "finetune.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert make_request(yaml.safe_load(recipe)).epochs == 20


def test_the_papers_tasks_are_listed() -> None:
    """With data set, the split that each is judged on, and its prompt or the number of its classes and prompts."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (DOCS / "guides" / "protocols.md").read_text(), re.MULTILINE)
    listed = {name: rest for name, rest in rows if name not in SURROGATES}
    assert list(listed) == list(named_tasks())
    for name, task in named_tasks().items():
        config = f" ({task['config']})" if "config" in task else ""
        asked = task["objective"]
        prompts = [asked.get("prompt")] if isinstance(asked.get("prompt"), str) else asked.get("prompt", ())
        said = (
            [f"`{asked['template']}`", " / ".join(asked["label_words"])]
            if "template" in asked
            else [str(len(asked["classes"])), str(len(prompts))]
        )
        assert listed[name].split(" | ") == [f"{task['ref']}{config}", task["test"], *said]


def test_renderings_and_the_defaults_of_training_are_listed() -> None:
    protocols = (DOCS / "guides" / "protocols.md").read_text()
    for name, known in SURROGATES.items():
        (row,) = re.findall(rf"^\| `{name}` \| .*$", protocols, re.MULTILINE)
        assert known.judged_on in row and all(f"`{rendering}`" in row for rendering in known.renderings)
    page = (DOCS / "guides" / "finetune.md").read_text()
    for kind in OBJECTIVES.names():
        training, called = OBJECTIVES.find(kind).training, {"sgd": "SGD", "adamw_torch": "AdamW"}
        if training is None:
            continue
        name = f"`{kind}`" if training != Training() else "all others"
        (row,) = re.findall(rf"^\| {name} \| (.*) \|$", page, re.MULTILINE)
        lr = f"{training.lr:.0e}".replace("e-0", "e-")
        assert row.split(" | ")[:4] == [called[training.optimizer], lr, str(training.batch), str(training.epochs)]


def test_everything_of_mergekit_is_on_its_page() -> None:
    listed = set(re.findall(r"`([\w.]+)`", (DOCS / "guides" / "mergekit.md").read_text(encoding="utf-8")))
    assert {*TRANSLATED, *REFUSED, *KNOWN, *MergekitConfig.model_fields} - {"parameters", "tokenizer"} <= listed


def test_the_mask_reader_reads_what_load_mask_reads(models: Path) -> None:
    out = models / "out"
    merge_from_hub(models / "base", [models / "swap"], out=out, localizer=Magnitude(density=0.01), figures=False)
    page = DOCS / "formats" / "mask-file.md"
    (code,) = blocks(page, "python")
    reader: dict[str, Any] = {}
    exec(code, reader)
    found, due = reader["read_mask"](out / "masks" / "swap.safetensors"), load_mask(out, "swap")
    assert found.keys() == due.keys()
    for name, (shape, ones) in found.items():
        assert list(due[name].shape) == shape
        assert np.flatnonzero(due[name].numpy()).tolist() == ones
    assert sum(len(ones) for _, ones in found.values()) == 12


def test_even_ties_are_those_of_the_page() -> None:
    for code in blocks(DOCS / "concepts" / "top-k.md", "python"):
        exec(code, {})


def test_the_example_in_two_dimensions() -> None:
    (code,) = blocks(DOCS / "concepts" / "without-data.md", "python")
    exec(code, {})


def test_components_of_another_package(models: Path) -> None:
    """The localizer, the method and the kind of checkpoint of examples/my-merging, installed, found by their names."""
    package = models / "my-merging"
    shutil.copytree(ROOT / "examples" / "my-merging", package)  # setuptools builds beside the source
    install = ["pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-t", "site", package]
    done = subprocess.run([sys.executable, "-m", *install], cwd=models, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    nested = models / "nested"
    (nested / "model").mkdir(parents=True)
    (models / "swap" / "model.safetensors").rename(nested / "model" / "model.safetensors")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(models / "site"), str(ROOT)])}
    for asked in (["--localizer", "relative", "--density", "0.1"], ["--method", "median"]):
        command = ["merge", "--base", "base", "--ft", "reverse", "nested", *asked, "--out", asked[1], "--no-figures"]
        done = subprocess.run(
            [sys.executable, "-m", "hf_locstitch", *command],
            cwd=models,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert sum(int(mask.sum()) for mask in load_mask(models / "relative", "nested").values()) == 123


def test_the_method_shown_is_the_one_in_use() -> None:
    text = (ROOT / "hf_locstitch" / "stitch" / "methods" / "dare.py").read_text(encoding="utf-8")
    assert any(block.startswith("class Dare") and block in text for block in blocks(DOCS / "extending.md", "python"))


@cache
def generated() -> dict[str, str]:
    if importlib.util.find_spec("mkdocs") is None:
        return dict.fromkeys(("reference/recipe.md", "reference/commands.md", "reference/errors.md"), "")
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="pip install .[docs]")
def test_references_are_complete() -> None:
    pages = generated()
    recipe = pages["reference/recipe.md"]
    assert all(f"| `{key}` |" in recipe for key in (*Recipe.model_fields, *FinetuneRequest.model_fields))
    for registry in (LOCALIZERS, METHODS, STITCHERS, OBJECTIVES):
        for name in registry.names():
            section = recipe[recipe.index(f"### `{name}` {{#") :].split("\n### ")[0]
            assert all(f"| `{key}` |" in section for key in registry.find(name).model_fields)  # type: ignore[attr-defined]
    assert all(f"## `{name}`" in pages["reference/commands.md"] for name in COMMANDS)


def test_every_class_of_error_is_in_troubleshooting() -> None:
    text = (DOCS / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(f"`{kind.__name__}`" in text for kind in kinds)


def test_every_public_name_is_in_the_python_reference() -> None:
    import hf_locstitch

    text = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    assert all(f".{name}\n" in text for name in hf_locstitch.__all__ if name != "__version__")

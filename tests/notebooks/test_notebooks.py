"""The notebooks: valid, without outputs, and every cell runs on tiny models of a Hub on this machine; and the guide.

In this process, which takes a second or two each; in a real kernel, too, where nbclient and ipykernel are installed
(`make notebooks`).
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import nbformat
import pytest
from helpers.data import write_jsonl
from helpers.language_models import favouring
from huggingface_hub import ModelCard

from loopback_hub import LoopbackHub

FOLDER = Path(__file__).parents[2] / "notebooks"
GUIDE = FOLDER.parent / "docs" / "guides" / "python.md"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
KERNEL = all(importlib.util.find_spec(name) for name in ("nbclient", "ipykernel"))


def tagged(cell: Any, tag: str) -> bool:
    return tag in cell.metadata.get("tags", ())


def prepared(name: str, parameters: Mapping[str, Any]) -> Any:
    """The notebook without its installation, and with other values after the cell of its parameters."""
    book = nbformat.read(FOLDER / name, as_version=4)
    (place,) = (place for place, cell in enumerate(book.cells) if tagged(cell, "parameters"))
    given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    book.cells.insert(place + 1, nbformat.v4.new_code_cell(given))
    book.cells = [cell for cell in book.cells if not tagged(cell, "install")]
    return book


def run_here(book: Any) -> list[Any]:
    """What its cells display: what they hand to `display`, and what their last lines evaluate to."""
    shown: list[Any] = []
    names: dict[str, Any] = {"display": shown.append}
    for cell in (cell for cell in book.cells if cell.cell_type == "code"):
        tree = ast.parse(cell.source)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        shown += [] if value is None else [value]
    return shown


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base that favours A, finetunes for B, C and D, and examples of two sets."""
    folder = tmp_path_factory.mktemp("models")
    return {word: favouring(folder / word, word, seed=ord(word)) for word in "ABCD"}


@pytest.fixture
def parameters(
    models: Mapping[str, Path], home_hub: LoopbackHub, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict[str, Any]]:
    """Of each notebook: repos of the Hub, and sets in files."""
    own = uuid4().hex[:12]
    for word, folder in models.items():
        home_hub.add_repo(f"demo/{own}-{word}", {path.name: path for path in folder.iterdir()})
    base, *finetuned = (f"demo/{own}-{word}" for word in models)
    sets = {name: {"data": {name: str(tmp_path / f"{name}.jsonl")}} for name in ("letters", "others")}
    for name, seconds in (("letters", "ABBC"), ("others", "BBBC")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"A {letter}"} for letter in seconds])
    monkeypatch.chdir(tmp_path)
    grid = {"method": ["locstitch", "average"], "density": [0.5, 1.0]}
    merged = {"BASE": base, "FINETUNED": finetuned, "PUSH_TO": f"demo/{own}-merged"}
    return {
        "merge.ipynb": {**merged, "JUDGED_BY": sets["letters"], "PROMPT": "A B"},
        "add_a_skill.ipynb": {
            "BASE": base, "SKILLS": {"b": finetuned[0], "c": finetuned[1]}, "NEW": "d", "NEW_MODEL": finetuned[2],
        },
        "compare.ipynb": {
            **merged, "GRID": grid, "SELECT": sets["letters"], "REPORT": sets["others"], "PUSH_TO": None,
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_kept_valid_and_without_outputs(name: str) -> None:
    book = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert f"/blob/main/notebooks/{name})" in book.cells[0].source


def test_every_cell_runs_here(parameters: Mapping[str, Mapping[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    shown = {name: run_here(prepared(name, parameters[name])) for name in NOTEBOOKS}
    kinds = {name: [type(one).__name__ for one in found] for name, found in shown.items()}
    result, report, plan = "MergeResult", "EvaluationReport", "MergePlan"
    assert kinds == {
        "add_a_skill.ipynb": [*3 * [result], result, "Inspection", "VerifyReport"],
        "compare.ipynb": ["ComparisonReport", plan],
        "merge.ipynb": [plan, result, "Inspection", report, result, report],
    }
    assert all(one._repr_html_().startswith("<div") for found in shown.values() for one in found)
    checked, compared = shown["add_a_skill.ipynb"][-1], shown["compare.ipynb"][0]
    assert checked.ok and not checked.skipped and len(compared.entries) == 3
    assert [mask.name for mask in shown["add_a_skill.ipynb"][-2].masks] == ["b", "c", "d"]
    card = ModelCard.load(parameters["merge.ipynb"]["PUSH_TO"])
    assert "exact-match" in card.text and capsys.readouterr().out


def test_the_code_of_the_guide_runs(
    models: Mapping[str, Path], home_hub: LoopbackHub, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, word in {"base": "A", "math": "B", "code": "C"}.items():
        home_hub.add_repo(f"lab/{name}", {path.name: path for path in models[word].iterdir()})
    write_jsonl(tmp_path / "math-test.jsonl", [{"text": f"A {letter}"} for letter in "ABBC"])
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace("org/", "lab/"), "guide", "exec"), names)
    assert len(blocks) == 4 and home_hub.head("lab/merged") != names["pushed"].commit
    assert names["mask"].keys() and "of the best finetune's score" in capsys.readouterr().out


@pytest.mark.skipif(not KERNEL, reason="make notebooks")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_runs_in_a_kernel(name: str, parameters: Mapping[str, Mapping[str, Any]], tmp_path: Path) -> None:
    from nbclient import NotebookClient

    book = prepared(name, parameters[name])
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    tables = [output.data["text/html"] for cell in book.cells for output in cell.get("outputs", ()) if "data" in output]
    assert tables and all(table.startswith("<div") for table in tables)
    nbformat.write(book, tmp_path / name)

"""JSON and YAML of strangers: within bounds, and wrong in one way only."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

import pytest
from helpers.models import random_state, save

from hf_locstitch.checkpoints.checkpoint import read_card, read_json
from hf_locstitch.checkpoints.folder import FolderSource
from hf_locstitch.errors import CheckpointError, RecipeError
from hf_locstitch.plan.recipe_file import load_recipe
from hf_locstitch.runtime import parsing
from hf_locstitch.runtime.parsing import front_matter, parse_json, parse_yaml

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a [*a]",
        "[" * 100_000,
        "[" * 100 + "]" * 100,
        "a:\n" + "".join(" " * i + "- \n" for i in range(500)),
        "a: [",
        "? {}",
        "!!python/object/apply:os.system [ls]",
        "!!int []",
        "2001-99-99",
        "a: 1\n---\nb: 2",
        "x" * (parsing.YAML_BYTES + 1),
        "\x00",
    ],
)
def test_yaml_out_of_bounds(text: str) -> None:
    began = monotonic()
    with pytest.raises(ValueError):
        parse_yaml(text)
    assert monotonic() - began < 10


def test_yaml_within_bounds() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: {<<: {d: 3}}") == {"a": [1, 2], "b": [1, 2], "c": {"d": 3}}
    assert parse_yaml("") is None and parse_yaml("3") == 3


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"[" * 100 + b"]" * 100, b'{"a": "\\ud800"}', b"\xff\xfe{\x00}\x00", b"9" * 5000, b""]
)
def test_json_out_of_bounds(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(content)
    with pytest.raises(ValueError, match="4 bytes, more than the 3"):
        parse_json(b"1234", largest=3)


def test_front_matter() -> None:
    assert front_matter("\n---\r\na: 1\r\nb: 2\r\n---\r\n# Title\n---\n") == "a: 1\nb: 2"
    assert front_matter("# Title\n---\na: 1\n---\n") == front_matter("---\na: 1\n") == front_matter("") == ""
    assert front_matter("---" + "\n" * 1_000_000) == ""


def test_files_out_of_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model", random_state(0), config='{"a":' * 100_000)
    (folder / "README.md").write_text(f"---\n{BOMB}---\n# Title\n")
    (tmp_path / "recipe.yaml").write_text(BOMB)
    source = FolderSource(folder)
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON .*deep"):
        read_json(source, "config.json")
    assert read_card(source) == {}
    with pytest.raises(RecipeError, match="aliases stand for more than"):
        load_recipe(tmp_path / "recipe.yaml")
    monkeypatch.setattr("hf_locstitch.checkpoints.checkpoint.JSON_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than the 100"):
        read_json(source, "config.json")

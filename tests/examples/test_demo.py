"""The demo's commands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from demo.main import command_runner


def test_a_repo_is_not_mistaken_for_a_folder_where_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `make demo WORK=demo` keeps the merge of the repo demo/merged in the folder demo/merged
    (tmp_path / "demo" / "merged").mkdir(parents=True)
    (tmp_path / "is_folder.py").write_text("import os, sys\nprint(os.path.isdir(sys.argv[1]))")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    run = command_runner(os.environ, tmp_path / "work")

    assert run(["is_folder", "demo/merged"]).strip() == "False"

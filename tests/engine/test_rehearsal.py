"""Compiled loops: ready before they are needed, kept where they outlive an installation, and told of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import finetune, random_state, save
from helpers.systems import needs_permissions

LARGE = {"model.layers.0.w.weight": (1100, 1000)}  # more elements than are sampled for its bracket

NOTHING_NEW = """
import sys
from hf_locstitch import merge_from_hub
from hf_locstitch.engine import execute, rehearsal
from hf_locstitch.runtime import kernels

def known():
    return {name: len(loop.signatures) for name, loop in vars(kernels).items() if hasattr(loop, "signatures")}

make = execute.make

def rehearsed(plan, *others):
    for dtypes in rehearsal.loop_dtypes(plan):
        rehearsal.rehearse(dtypes)
    before.update(known())
    return make(plan, *others)

before = {}
execute.make = rehearsed
merge_from_hub(sys.argv[1], sys.argv[2:4], out=sys.argv[4], localizer={"density": 0.1}, figures=False)
assert all(before[name] for name in ("sizes", "candidates", "among", "gaps", "more_than", "find", "put")), before
assert known() == before, (before, known())
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merge_compiles_nothing_that_was_not_rehearsed(dtype: torch.dtype, tmp_path: Path) -> None:
    base = random_state(0, dtype, LARGE)
    folders = [save(tmp_path / "base", base)] + [save(tmp_path / f"ft{i}", finetune(base, i)) for i in range(2)]
    words = [sys.executable, "-c", NOTHING_NEW, *map(str, folders), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def merge_in(home: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A merge in a process that knows of no other place for compiled loops than HF_HOME."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": ""}
    del environment["NUMBA_CACHE_DIR"]
    code = """
import sys
from hf_locstitch import merge_from_hub
from hf_locstitch.runtime import kernels
from hf_locstitch.runtime.compiling import was_compiled
merge_from_hub("base", ["ft"], out=sys.argv[1], figures=False, show_progress=True)
print(was_compiled(kernels.sizes))
"""
    out = f"out{len(list(folder.iterdir()))}"
    return subprocess.run(
        [sys.executable, "-c", code, out], env=environment, cwd=folder, capture_output=True, text=True
    )


def test_loops_are_kept_in_the_users_cache_and_told_of_once(tmp_path: Path) -> None:
    models = tmp_path / "models"
    base = random_state(0)
    save(models / "base", base)
    save(models / "ft", finetune(base, 1))
    first = merge_in(tmp_path / "home", models)
    assert first.stdout == "True\n" and first.stderr.count("compiling loops") == 1, first.stderr
    assert list((tmp_path / "home" / "hf-locstitch" / "loops").rglob("*sizes*.nbc"))
    second = merge_in(tmp_path / "home", models)
    assert second.stdout == "False\n" and "compiling" not in second.stderr, second.stderr


@needs_permissions
def test_a_folder_that_others_can_write_to_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_locstitch.runtime.own_cache import private_cache

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    folder = private_cache("loops")
    assert folder is not None and folder.is_dir()
    folder.chmod(0o777)
    assert private_cache("loops") is None
    (tmp_path / "hf-locstitch" / "hashes").write_text("in the way")
    assert private_cache("hashes") is None

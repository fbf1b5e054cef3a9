"""Merges of models on the Hub, and what went over the wire for them."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants

from helpers.runs import carry_out, files_of
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.settings import Settings
from loopback_hub import LoopbackHub

SHAPES = {"embed.w": (200, 300)} | {f"layers.{i}.w": (300, 400) for i in range(6)} | {"head.w": (200, 300)}
SIZE = 2 * sum(a * b for a, b in SHAPES.values())
PASSING = Settings(chunk=8192, workers=2, cache=False, window=100_000)
CACHING = Settings(chunk=8192, workers=2)


def merged(repos: Sequence[str], out: Path, how: Settings, **fields: object) -> dict[str, str]:
    """The files of a merge, in which only the manifest tells the time."""
    entries = [{"ref": ref, "name": ref[-3:]} for ref in repos[1:]]
    recipe = make_recipe({"base": repos[0], "finetuned": entries, "figures": False, **fields})
    carry_out(make_plan(recipe, how), out)
    return files_of(out)


def served(hub: LoopbackHub, repo: str) -> dict[str, int]:
    """Bytes of each weight file that went over the wire."""
    found: dict[str, int] = {}
    for request in list(hub.requests):
        path = request.path.split("?")[0]
        if request.method == "GET" and f"/{repo}/resolve/" in path and path.endswith(".safetensors"):
            file = path.rsplit("/", 1)[1]
            found[file] = found.get(file, 0) + request.sent
    return found


def sizes(hub: LoopbackHub, repo: str) -> dict[str, int]:
    return {file: len(hub.read(repo, file)) for file in hub.files(repo) if file.endswith(".safetensors")}


def empty_cache() -> None:
    gc.collect()  # Windows deletes no file that is mapped
    shutil.rmtree(constants.HF_HUB_CACHE)


def restart(hub: LoopbackHub) -> None:
    """End answers that are still stalled: whoever reads the log next would wait for them."""
    hub.stop()
    hub.start()

"""The user's token goes to the Hub and to no other server, wherever the Hub sends a download."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest
from helpers.models import finetune, random_state, save
from helpers.runs import quick_merge

from loopback_hub import LoopbackHub


@pytest.mark.parametrize("cache", [True, False], ids=["kept", "streamed"])
def test_another_origin_gets_no_token(
    cache: bool, home_hub: LoopbackHub, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_state(0)
    folders = [save(tmp_path / "base", base), save(tmp_path / "ft", finetune(base, 1))]
    repos = [f"demo/{folder.name}-{uuid4().hex[:8]}" for folder in folders]
    for repo, folder in zip(repos, folders, strict=True):
        home_hub.add_repo(repo, {path.name: path for path in folder.iterdir()})
    monkeypatch.setattr(home_hub, "redirect_lfs", True)
    quick_merge(repos[0], repos[1:], out=tmp_path / "out", cache=cache)
    storage = [request for request in home_hub.requests if request.path.startswith("/_lfs/")]
    assert storage and not any(request.authorization for request in storage)
    assert any(request.authorization for request in home_hub.requests)

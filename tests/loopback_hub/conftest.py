"""Hubs with one user and with three."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from loopback_hub import LoopbackHub

USERS = {"hf_loopback": "demo", "hf_ann": "ann", "hf_eve": "eve"}


@pytest.fixture
def town(tmp_path: Path, hub_cache: Path) -> Iterator[LoopbackHub]:
    """A Hub with three users; ann is in the organisation lab."""
    with LoopbackHub(tmp_path / "town", users=USERS, orgs={"ann": ["lab"]}) as started:
        yield started


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token="hf_loopback")

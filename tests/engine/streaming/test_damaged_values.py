"""Values that are not finite because a download is damaged: that is said, and not that the model is broken."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from helpers.streaming import CACHING, merged
from helpers.systems import needs_early_reading
from huggingface_hub import constants

from hf_locstitch.checkpoints.hub import HubSource
from hf_locstitch.errors import IntegrityError
from loopback_hub import LoopbackHub


@needs_early_reading
@pytest.mark.parametrize("victim", range(2), ids=["base", "finetuned"])
def test_of_what_an_earlier_process_left(
    victim: int, repos: list[str], expected: dict[str, str], tmp_path: Path, home_hub: LoopbackHub
) -> None:
    """A beginning of a file, full of NaN behind its header. The same command again fetches it anew."""
    file = max(home_hub.files(repos[victim]).items(), key=lambda named: named[1])[0]
    content, digest = home_hub.read(repos[victim], file), HubSource(repos[victim], None).files[file].sha256
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{repos[victim].replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    (blobs / f"{digest}.locstitch-incomplete").write_bytes(content[:2000] + b"\x8f\x7f" * (len(content) // 4))
    with warnings.catch_warnings(), pytest.raises(IntegrityError, match=f"{file} of {repos[victim]}"):
        warnings.simplefilter("error", RuntimeWarning)
        merged(repos, tmp_path / "out", CACHING)
    assert merged(repos, tmp_path / "out", CACHING) == expected

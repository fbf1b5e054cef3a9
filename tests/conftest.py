"""Fixtures of all tests. The Hub's client and torch read settings when they are imported: these are set here first."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.portable import other_system

_HOME = tempfile.mkdtemp(prefix="hf-locstitch-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
_TAKEN = "HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_ENDPOINT HF_HUB_CACHE HF_HUB_OFFLINE HF_DATASETS_CACHE"
for _name in _TAKEN.split():
    os.environ.pop(_name, None)
os.environ.update(
    HF_HOME=_HOME,
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    NO_PROXY="127.0.0.1,localhost",
    no_proxy="127.0.0.1,localhost",
)
os.environ.update(
    dict.fromkeys(("TMPDIR", "TEMP", "TMP"), _HOME)
)  # what processes of tests leave, such as torchrun its logs, goes with it
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parent / "__pycache__" / "loops"))  # outlives HF_HOME
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models are tiny, and tests run side by side

from helpers.models import State, random_state, save  # noqa: E402
from hypothesis import settings  # noqa: E402

from loopback_hub import LoopbackHub  # noqa: E402

# The first call of a compiled loop takes seconds.
settings.register_profile("compiled", deadline=None)
settings.load_profile("compiled")

_HOME_HUB = LoopbackHub(Path(_HOME) / "hub", orgs={"demo": ["lab"]}).start()
os.environ["HF_ENDPOINT"] = _HOME_HUB.endpoint

if os.environ.get(other_system.ASKED) == "1":
    other_system.resemble()
    _own = [str(Path(other_system.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(_own)  # of subprocesses


@pytest.fixture
def home_hub(monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The Hub that HF_ENDPOINT names in this process; its user demo is logged in. Repos stay: give them new names."""
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")
    _HOME_HUB.requests.clear()
    return _HOME_HUB


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A download cache of this test's own: repositories of other tests have the same names."""
    cache = tmp_path / "hub-cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def hub(tmp_path: Path, hub_cache: Path) -> Iterator[LoopbackHub]:
    """A started, empty Hub with one user, demo, whose token is hf_loopback."""
    with LoopbackHub(tmp_path / "hub") as started:
        yield started


@pytest.fixture
def base(tmp_path: Path) -> State:
    """A small checkpoint in tmp_path/base."""
    state = random_state(0)
    save(tmp_path / "base", state)
    return state

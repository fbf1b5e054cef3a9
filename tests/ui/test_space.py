"""The files of the Space: complete, and of the versions that are tested."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OWN = {"authlib", "gradio[oauth]", "pillow"}  # of the page alone


def pins(path: Path) -> dict[str, str]:
    """Name -> version, in the newest Python's lines."""
    found = re.findall(r"^([\w.\[\]-]+)==([\w.]+)(.*)$", path.read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version, marker in found if "<" not in marker}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is of Python 3.11")
def test_the_space_pins_what_the_package_needs() -> None:
    import tomllib

    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[>=\[]", one)[0].lower().replace("_", "-") for one in needed}
    space, tested = pins(ROOT / "space" / "requirements.txt"), pins(ROOT / "constraints.txt")
    assert space.keys() == names | OWN
    pinned = names | OWN & tested.keys()
    assert {name: space[name] for name in pinned} == {name: tested[name] for name in pinned}


def test_the_space_asks_for_the_least_that_it_needs() -> None:
    about = yaml.safe_load((ROOT / "space" / "README.md").read_text().split("---")[1])
    assert about["hf_oauth"] is True and about["hf_oauth_scopes"] == ["read-repos", "contribute-repos"]
    assert pins(ROOT / "space" / "requirements.txt")["gradio[oauth]"] == about["sdk_version"]
    assert (ROOT / "space" / about["app_file"]).exists()

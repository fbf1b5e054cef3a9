"""What is published: the files that repeat the version and the requirements, and what a release checks."""

from __future__ import annotations

import re
import runpy
import subprocess
from importlib.metadata import entry_points, metadata, requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hf_locstitch import __version__

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}


@pytest.fixture(scope="module")
def release() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".github" / "release.py"))


def test_the_notes_of_a_version(release: dict[str, Any]) -> None:
    changelog = (
        "# Changelog\n\n## Unreleased\n\n## 1.10.0 - 2027-01-02\n\n### Added\n\n- ten\n\n## 1.1.0 - 2026-12-01\n- one\n"
    )
    assert release["notes"](changelog, "1.10.0") == ("2027-01-02", "### Added\n\n- ten")
    assert release["notes"](changelog, "1.1.0") == ("2026-12-01", "- one")
    assert release["notes"](changelog, "1.1") is None and release["notes"](changelog, "2.0.0") is None


def test_what_a_release_lacks(release: dict[str, Any]) -> None:
    files = {
        "CHANGELOG.md": "## 1.2.0 - 2027-01-02\n- a\n",
        "CITATION.cff": 'version: "1.2.0"\ndate-released: "2027-01-02"\nhttps://github.com/me/it',
        "pyproject.toml": "https://github.com/OWNER/it",
    }
    assert list(release["problems"]("1.2.0", files, None, None)) == []
    assert list(release["problems"]("1.2.0", files, "v1.2.1", None)) == ["the tag is v1.2.1, the version 1.2.0"]
    (told,) = release["problems"]("1.2.0", files, "v1.2.0", "me/it")
    assert told.startswith("pyproject.toml does not name https://github.com/me/it")
    later = files | {"CHANGELOG.md": "## 1.2.0 - 2027-01-03\n- a\n"}
    assert "2027-01-03" in next(release["problems"]("1.2.0", later, None, None))
    assert len(list(release["problems"]("1.3.0", files, None, None))) == 2


def test_this_version_could_be_released(release: dict[str, Any]) -> None:
    files = {name: (ROOT / name).read_text() for name in ("CHANGELOG.md", "CITATION.cff", "pyproject.toml")}
    assert release["version"]() == __version__
    assert list(release["problems"](__version__, files, f"v{__version__}", None)) == []


def test_the_readme_on_pypi_has_no_relative_link(release: dict[str, Any]) -> None:
    readme = '[a](docs/a.md#b), [b](https://b.org), [c](#c), ![d](d.png), [![e](e.svg)](LICENSE)\n<img src="f.svg">'
    file, raw = "https://github.com/me/it/blob/v1", "https://raw.githubusercontent.com/me/it/v1"
    assert release["absolute"](readme, "me/it", "v1") == (
        f"[a]({file}/docs/a.md#b), [b](https://b.org), [c](#c), ![d]({raw}/d.png), "
        f'[![e]({raw}/e.svg)]({file}/LICENSE)\n<img src="{raw}/f.svg">'
    )


def test_every_link_of_this_readme_is_made_absolute(release: dict[str, Any]) -> None:
    relative = (ROOT / "README.md").read_text(encoding="utf-8")
    if "](docs/" not in relative:
        pytest.skip("the README of a release, where this was done already")
    readme = release["absolute"](relative, "me/it", "v1")
    targets = re.findall(r'(?:\]\(|(?:src|href)=")([^)"]+)', readme)
    ours = [found[1] for target in targets if (found := re.match(r"https://\S+?/me/it/(?:blob/)?v1/([^#]+)", target))]
    assert all(target.startswith("https://") for target in targets)
    assert "docs/assets/dataflow.svg" in ours and all((ROOT / path).exists() for path in ours)


def test_conda_has_the_same_requirements() -> None:
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())
    assert recipe["context"]["version"] == __version__
    ours = {_named(line) for line in requires("hf-locstitch") or () if "extra ==" not in line}
    theirs = recipe["requirements"]["run"]
    assert f"python {metadata('hf-locstitch')['Requires-Python']}" in theirs
    assert {_named(line) for line in theirs if not line.startswith("python ")} == ours
    assert recipe["build"]["python"]["entry_points"] == [f"{_script().name} = {_script().value}"]


def test_the_source_distribution_holds_every_folder() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not in a checkout")
    folders = {name.split("/")[0] for name in tracked.stdout.split("\0") if "/" in name}
    grafted = {*re.findall(r"^graft (\S+)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)}
    assert folders - {"hf_locstitch", ".ci"} == grafted


def _named(requirement: str) -> tuple[str, str]:
    parsed = Requirement(requirement)
    return canonicalize_name(CONDA_NAMES.get(parsed.name, parsed.name)), str(parsed.specifier)


def _script() -> Any:
    (script,) = entry_points(group="console_scripts", name="hf-locstitch")
    return script


def test_it_can_be_an_extension_of_hf() -> None:
    """`hf extensions install OWNER/hf-locstitch` takes a script hf-locstitch of the package, unless a file of that name
    lies in the repo's root, which it would run in its place (huggingface_hub 2.4.0, cli/extensions.py)."""
    assert _script().name == "hf-locstitch" and not (ROOT / "hf-locstitch").exists()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_do_no_more_than_they_need(path: Path) -> None:
    """They read, but for named jobs; what they run is in the checkout."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for script in re.findall(r"[\w./]+\.py\b", path.read_text()):
        assert (ROOT / re.sub("^/?checkout/", "", script)).exists(), script
    for name, job in workflow["jobs"].items():
        assert "timeout-minutes" in job, name


def test_what_the_image_copies_is_there() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {name for line in copied for name in line.split()} == let_in
    assert all((ROOT / name).exists() for name in let_in)

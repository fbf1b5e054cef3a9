"""Where a merge's folder comes to be: links, mount points, and places that others take meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from helpers.models import finetune, random_state, save
from helpers.runs import files_of, quick_merge
from helpers.systems import needs_links

from hf_locstitch.engine import run
from hf_locstitch.errors import OutputError, WorkError
from hf_locstitch.runtime.files import is_mount_point


@pytest.fixture
def merge(tmp_path: Path) -> Callable[[Path], object]:
    save(tmp_path / "base", random_state(0))
    save(tmp_path / "ft", finetune(random_state(0), 1))
    return lambda out: quick_merge(tmp_path / "base", tmp_path / "ft", out=out)


def _left(tmp: Path) -> list[str]:
    return sorted(path.name for path in tmp.iterdir() if path.name not in ("base", "ft"))


@needs_links
def test_a_link_to_an_empty_folder_is_written_through(tmp_path: Path, merge: Callable[[Path], object]) -> None:
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/big")
    merge(tmp_path / "out")
    merge(tmp_path / "plain")
    assert (tmp_path / "out").is_symlink() and files_of(tmp_path / "disk" / "big") == files_of(tmp_path / "plain")
    assert _left(tmp_path) == ["disk", "out", "plain"] and _left(tmp_path / "disk") == ["big"]
    merge(tmp_path / "out")  # it is there already


@needs_links
def test_a_link_to_nothing_is_refused(tmp_path: Path, merge: Callable[[Path], object]) -> None:
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(OutputError, match=r"out is a link to .*nowhere, which does not exist"):
        merge(tmp_path / "out")
    assert _left(tmp_path) == ["out"]


def test_a_mount_point_is_refused(
    tmp_path: Path, merge: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_mount_point(Path("/")) and not is_mount_point(tmp_path)
    (tmp_path / "out").mkdir()
    mounted = SimpleNamespace(mountpoint=str(tmp_path / "out"))  # a folder of the same file system
    monkeypatch.setattr("psutil.disk_partitions", lambda all: [mounted] if all else [])
    with pytest.raises(OutputError, match=r"out is a mount point.*--out .*out/merged"):
        merge(tmp_path / "out")
    assert _left(tmp_path) == ["out"]
    merge(tmp_path / "out" / "merged")
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()


def _meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let something happen late in the next merge."""
    write_card = run.write_card

    def late(*args: object) -> None:
        act()
        write_card(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(run, "write_card", late)


def test_of_two_merges_to_one_folder_the_first_stays(
    tmp_path: Path, merge: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def win() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model.safetensors").write_bytes(b"the winner's")

    merge(tmp_path / "plain")
    with monkeypatch.context() as patch:
        _meanwhile(patch, win)
        with pytest.raises(WorkError, match=r"another result.*the finished one is in .*partial/out") as raised:
            merge(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"the winner's"
    assert len(list((tmp_path / "out").iterdir())) == 1
    (partial,) = tmp_path.glob(".out.*.partial")
    assert str(partial / "out") in str(raised.value) and files_of(partial / "out") == files_of(tmp_path / "plain")
    with pytest.raises(OutputError, match="nothing is overwritten"):
        merge(tmp_path / "out")


@pytest.mark.parametrize("kind", ["file", pytest.param("link", marks=needs_links)])
def test_a_file_that_comes_to_be_there(
    tmp_path: Path, merge: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    other.write_text("kept")
    _meanwhile(monkeypatch, lambda: out.write_text("kept") if kind == "file" else out.symlink_to("other"))
    with pytest.raises(WorkError, match="left as it is"):
        merge(out)
    assert out.read_text() == "kept" == other.read_text()


def test_a_folder_that_cannot_be_moved(
    tmp_path: Path, merge: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Windows says it of a folder with a file that is open."""
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", Mock(side_effect=PermissionError(13, "Access is denied")))
        with pytest.raises(WorkError, match=r"Access is denied.*has a file in .*partial.out open"):
            merge(tmp_path / "out")
    assert len(_left(tmp_path)) == 1
    merge(tmp_path / "out")
    assert _left(tmp_path) == ["out"]


def test_an_empty_folder_that_comes_to_be_there(
    tmp_path: Path, merge: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    _meanwhile(monkeypatch, (tmp_path / "out").mkdir)
    merge(tmp_path / "out")
    assert (tmp_path / "out" / "locstitch.json").is_file()

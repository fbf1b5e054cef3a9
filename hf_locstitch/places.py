"""What is looked at before the work: whether the output may go where it is asked to, and whether it fits."""

from __future__ import annotations

import shutil
from pathlib import Path

from hf_locstitch.cost import estimate, human
from hf_locstitch.errors import OutputError
from hf_locstitch.manifest import Manifest, is_intact, read_manifest
from hf_locstitch.plan import MergePlan
from hf_locstitch.workplace import fingerprint


def check_out(out: Path, plan: MergePlan) -> Manifest | None:
    """The record of this very merge if `out` holds it complete. Raises OutputError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    record = read_manifest(out)
    if record is None or record.fingerprint != fingerprint(plan) or not is_intact(record, out):
        raise OutputError(f"{out} exists and is not an empty folder; nothing is overwritten. Name another --out.")
    return record


def check_disk(folder: Path, plan: MergePlan) -> None:
    """Raises OutputError if the output and its temporary files will not fit beside `folder`."""
    free, needed = shutil.disk_usage(_existing(folder)).free, estimate(plan).disk
    if free < needed:
        raise OutputError(
            f"{folder} needs up to {human(needed)} of disk, of which {human(free)} are free. "
            "Free some, or name an --out elsewhere."
        )


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.absolute().parent)

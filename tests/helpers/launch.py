"""The command in processes of its own: one, or several under torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def launch(
    count: int, cwd: Path, *args: object, command: str = "merge", figures: bool = False
) -> subprocess.CompletedProcess[str]:
    """`hf-locstitch COMMAND ARGS` in so many processes. figures: whether it draws them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    program = [*(torchrun if count > 1 else [sys.executable]), "-m", "hf_locstitch", command]
    asked = [*map(str, args), *([] if figures else ["--no-figures"])]
    return subprocess.run([*program, *asked], cwd=cwd, capture_output=True, text=True, timeout=300)

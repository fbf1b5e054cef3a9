"""The command in processes of its own: one, or several as under torchrun."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from helpers.portable import other_system

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
HEAVY = ["accelerate", "datasets", "torch", "transformers.models.auto.modeling_auto", "hf_locstitch.engine.model_run"]
LIMIT = 300  # seconds


def torchrun(
    count: int, cwd: Path, *args: object, command: str = "merge", figures: bool = False
) -> subprocess.CompletedProcess[str]:
    """`hf-locstitch COMMAND ARGS` in so many processes, started as users start them. figures: whether it draws them."""
    program = [*TORCHRUN, f"--nproc-per-node={count}", "-m", "hf_locstitch", *_asked(command, args, figures)]
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, timeout=LIMIT)


def launch(
    count: int, cwd: Path, *args: object, command: str = "merge", figures: bool = False
) -> subprocess.CompletedProcess[str]:
    """As `torchrun`, in processes forked from one that has imported what takes each of them seconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods() or os.environ.get(other_system.ASKED) == "1":
        return torchrun(count, cwd, *args, command=command, figures=figures)
    asked = _asked(command, args, figures)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    variables = {**os.environ, **_several(count)} if count > 1 else dict(os.environ)
    with TemporaryDirectory() as folder:
        texts = [(Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")) for rank in range(count)]
        ranks = [
            context.Process(target=_run, args=(asked, cwd, {**variables, **_rank(rank)}, *texts[rank]))
            for rank in range(count)
        ]
        for rank in ranks:
            rank.start()
        status = _status(ranks)
        out, err = ("".join(one.read_text() for one in kind) for kind in zip(*texts, strict=True))
    return subprocess.CompletedProcess(asked, status, out, err)


def _asked(command: str, args: Iterable[object], figures: bool) -> list[str]:
    return [command, *map(str, args), *([] if figures else ["--no-figures"])]


def _several(count: int) -> dict[str, str]:
    """What torchrun tells all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    number = str(count)
    return {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _rank(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _run(args: list[str], cwd: Path, variables: dict[str, str], out: Path, err: Path) -> None:
    """In the new process."""
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    from hf_locstitch.cli.main import main

    sys.exit(main(args))


def _status(ranks: list[BaseProcess]) -> int:
    """0 once all have ended well; else that of the first that has not, and the others are ended."""
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        ended = connection.wait([*running], LIMIT)
        statuses = [running.pop(one).exitcode for one in ended]  # pyright: ignore[reportArgumentType]
        if not ended or any(statuses):
            for rank in running.values():
                rank.terminate()
                rank.join(30)
            return next((status for status in statuses if status), None) or 1
    return 0

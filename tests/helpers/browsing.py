"""A Hub with models to merge, and the page of `hf_locstitch.ui` served in a process, as a Space or for one user."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.language_models import WORDS, make_tokenizer
from loopback_hub import LoopbackHub

BASE, FINETUNES = "lab/tiny-base", ("lab/tiny-math", "lab/tiny-code", "lab/tiny-law")
SCOPES = "openid profile read-repos contribute-repos"
OAUTH = {"OAUTH_CLIENT_ID": "client", "OAUTH_CLIENT_SECRET": "secret", "OAUTH_SCOPES": SCOPES}
SPECIAL = 3  # words of the tokenizer that no text shows
STARTS_WITHIN = 900.0  # seconds, on a busy machine


def add_models(hub: LoopbackHub, folder: Path, width: int = 64) -> None:
    """A base and three finetunes of it, whose cards name it."""

    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=6,
        num_attention_heads=4, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for number, repo in enumerate((BASE, *FINETUNES)):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * number * torch.randn_like(parameter) ** 3)
                model.lm_head.weight[:SPECIAL] = 0  # so that no text ends at once
            model.save_pretrained(folder / repo)
            make_tokenizer().save_pretrained(folder / repo)
            lines = [f"base_model: {BASE}", "base_model_relation: finetune"] if repo != BASE else []
            card = "\n".join(["---", "license: apache-2.0", *lines, "---", f"# {repo}", ""])
            hub.add_repo(repo, {**{path.name: path for path in (folder / repo).iterdir()}, "README.md": card})


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@dataclass(frozen=True)
class Served:
    """A page that is served by a process."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self) -> None:
        """Until it answers."""
        until = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.address, timeout=60).read()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"the server did not start: {self.log.read_text()[-3000:]}")

    def workers(self) -> list[psutil.Process]:
        """The processes that work for its visitors."""
        return psutil.Process(self.process.pid).children()


@contextmanager
def serving(hub: LoopbackHub, folder: Path, *, space: bool) -> Iterator[Served]:
    """A page, that may not answer yet. space: as in a Space, with visitors; the server then has a token of its own,
    which must not be used."""
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "OAUTH_"))}
    environment |= hub.environment(folder / "home", "hf_server" if space else "hf_loopback")
    environment |= {"NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR", str(folder / "numba"))}
    arguments = ["--port", str(port), "--work-dir", str(folder / "work")]
    command = [sys.executable, "-m", "hf_locstitch", "ui", *arguments]
    if space:
        environment |= {**OAUTH, "OPENID_PROVIDER_URL": hub.endpoint}
        code = (
            "from pathlib import Path; from hf_locstitch.ui.serve import Server, UiConfig; "
            f"Server(UiConfig(Path({str(folder / 'work')!r}), port={port}, visitors=True)).run()"
        )
        command = [sys.executable, "-c", code]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield Served(f"http://127.0.0.1:{port}", process, folder / "server.log")
        finally:
            process.terminate()
            process.wait(60)


def users() -> Mapping[str, str]:
    """A visitor, and the one whose token the server itself has."""
    return {"hf_loopback": "demo", "hf_server": "owner"}

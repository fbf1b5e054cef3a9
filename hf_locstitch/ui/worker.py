"""`python -m hf_locstitch.ui.worker`: one piece of work for one visitor, in a process of its own.

One JSON object comes on standard input, with the visitor's token if they are signed in, so that it is in no argument,
file or environment that others could read; events go to standard output, one JSON object a line. When standard input
ends, the work is stopped: a server that dies takes its workers along, and what they did is found by the next one.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_locstitch.errors import CheckpointError, LocstitchError, RequestError
from hf_locstitch.runtime.files import write_all
from hf_locstitch.runtime.interrupts import raising_interrupts
from hf_locstitch.runtime.progress import Advance, Progress
from hf_locstitch.ui.calls import LAST, Event
from hf_locstitch.ui.visitor import PASSING

Emit = Callable[[Event], None]
EVERY = 0.25  # seconds between two events of one bar
MOST_NEW_TOKENS = 256
PROMPT = 2_000  # characters, at most
LONGEST = 300  # characters of an error of transformers
LIBRARIES = 2_000_000_000  # bytes that torch and transformers take by themselves


class EventProgress(Progress):
    """Progress bars as events."""

    def __init__(self, emit: Emit) -> None:
        super().__init__(False)
        self._emit = emit

    def say(self, text: str) -> None:
        self._emit({"event": "say", "text": text})

    @contextmanager
    def bar(self, stage: str, total: int, unit: str = "B") -> Iterator[Advance]:
        lock, done, told = threading.Lock(), 0, 0.0

        def tell() -> None:
            self._emit({"event": "progress", "stage": stage, "done": done, "total": total, "unit": unit.strip()})

        def advance(count: int) -> None:
            nonlocal done, told
            with lock:
                done += count
                if (now := time.monotonic()) - told >= EVERY:
                    told = now
                    tell()

        tell()
        yield advance
        tell()


class Warnings(logging.Handler):
    """What the package warns of, as events."""

    def __init__(self, emit: Emit) -> None:
        super().__init__(logging.WARNING)
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit({"event": "warning", "text": record.getMessage()})


def plan(asked: Mapping[str, Any], emit: Emit) -> None:
    """Plan a merge, and check what can be checked without doing it."""
    from hf_locstitch.api import check_possible, plan_merge
    from hf_locstitch.plan.describe import format_plan, plan_json

    made = plan_merge(asked["recipe"], cache=False)
    check_possible(made)
    emit({"event": "result", "plan": plan_json(made), "text": format_plan(made)})


def merge(asked: Mapping[str, Any], emit: Emit) -> None:
    """Merge, streaming the inputs, and push the result."""
    from hf_locstitch.api import carry_out, plan_merge
    from hf_locstitch.engine.imports import import_ahead

    emit({"event": "progress", "stage": "planning", "done": 0, "total": 0, "unit": ""})
    import_ahead()
    result = carry_out(plan_merge(asked["recipe"], cache=False), EventProgress(emit))
    densities = {name: mask.real_density for name, mask in result.manifest.masks.items()}
    emit({"event": "result", "url": result.url, "commit": result.commit, "densities": densities})


def masks(asked: Mapping[str, Any], emit: Emit) -> None:
    """Look at the masks of a published merge or localized checkpoint: small files only."""
    from hf_locstitch.inspection.inspect import inspect
    from hf_locstitch.report.figures.explorer import FILE

    with tempfile.TemporaryDirectory() as folder:
        found = inspect(asked["ref"], figures=folder)
        page = Path(folder) / FILE
        html = page.read_text(encoding="utf-8") if page.exists() else None
    emit({"event": "result", "page": html, "inspection": asdict(found), "text": found.describe()})


def generate(asked: Mapping[str, Any], emit: Emit) -> None:
    """Let a small causal language model go on with a text. Raises CheckpointError if it is not small, or not one.

    asked: with `ref`, `prompt`, `tokens`, and `most_bytes`, the bound for all files that are fetched.
    """
    from huggingface_hub import constants

    from hf_locstitch.checkpoints.checkpoint import open_source
    from hf_locstitch.checkpoints.opening import read_checkpoint
    from hf_locstitch.checkpoints.ref import parse_ref
    from hf_locstitch.engine.preflight import check_space
    from hf_locstitch.evaluation.models import check_language_model, fetch, needed
    from hf_locstitch.runtime.human import human

    checkpoint = read_checkpoint(open_source(parse_ref(asked["ref"])))
    sizes, most = checkpoint.source.files, int(asked["most_bytes"])
    size = sum(sizes[file].size for file in needed(checkpoint))
    if size > most:
        raise CheckpointError(
            f"{checkpoint.label} has {human(size)} of files, and models above {human(most)} are not run here. "
            "Its page shows how to run it on your own machine."
        )
    check_language_model(checkpoint)
    check_space(Path(constants.HF_HUB_CACHE), size)
    emit({"event": "progress", "stage": "loading", "done": 0, "total": 0, "unit": ""})
    folder = fetch(checkpoint)
    _bound_memory(4 * most + LIBRARIES)
    try:
        _go_on(str(folder), str(asked["prompt"])[:PROMPT], min(int(asked["tokens"]), MOST_NEW_TOKENS), emit)
    except LocstitchError:
        raise
    except Exception as error:  # of transformers, about a config, a tokenizer or memory
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST]}"
        raise CheckpointError(
            f"{checkpoint.label} could not be run with transformers ({why}). Try it in Python."
        ) from error


def _bound_memory(most: int) -> None:
    """Most bytes that this process may take, for a config may ask for a model that its weights do not hold."""
    try:
        import resource
    except ImportError:  # Windows has no such bound
        return
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _go_on(folder: str, prompt: str, tokens: int, emit: Emit) -> None:
    """The most likely continuation, text by text as it comes. No code of the repo's is run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            emit({"event": "text", "text": text})

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=True).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].shape[-1]:
        raise RequestError("the prompt has no token of this model's. Write something to go on from.")
    model.generate(
        **{key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask")},
        max_new_tokens=tokens,
        do_sample=False,
        streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    emit({"event": "result"})


ACTIONS: Mapping[str, Callable[[Mapping[str, Any], Emit], None]] = {
    "plan": plan,
    "merge": merge,
    "masks": masks,
    "generate": generate,
}


def work(asked: Mapping[str, Any], emit: Emit) -> int:
    """Do what is asked; the last event is a result, an error or that it was stopped. Returns the exit status."""
    handler = Warnings(emit)
    log = logging.getLogger("hf_locstitch")
    log.addHandler(handler)
    try:
        ACTIONS[asked["action"]](asked, emit)
        return 0
    except KeyboardInterrupt:
        emit({"event": "stopped"})
        return 130
    except LocstitchError as error:
        emit({"event": "error", "text": str(error), "resumable": not isinstance(error, RequestError)})
        return error.exit_status
    except Exception as error:
        emit({"event": "error", "text": f"{type(error).__name__}: {error}", "resumable": True})
        return 1
    finally:
        log.removeHandler(handler)


def main() -> int:
    """One request from standard input to its last event."""
    asked = json.loads(sys.stdin.readline())
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no event
    token = asked.pop("token", None)
    if token:
        os.environ["HF_TOKEN"] = token
    lock, done = threading.Lock(), threading.Event()

    def emit(event: Event) -> None:
        if event["event"] in LAST:
            done.set()
        text = json.dumps(event)
        told = (text.replace(token, "[token]") if token else text) + "\n"
        with lock, suppress(BrokenPipeError):  # of a server that has died: standard input ends, too
            write_all(events, told.encode())

    with raising_interrupts(lambda _: None):
        threading.Thread(target=_stop_at_end_of_input, args=(done,), daemon=True).start()
        with _passing_cache(asked):
            return work(asked, emit)


@contextmanager
def _passing_cache(asked: Mapping[str, Any]) -> Iterator[None]:
    """Where it is asked for, a home that is removed afterwards: what strangers look at is not kept."""
    if not asked.get("passing"):
        yield
        return
    homes = Path(os.environ["HF_HOME"]).parent
    homes.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=homes, prefix=f"{PASSING}{os.getpid()}-", ignore_cleanup_errors=True
    ) as folder:
        os.environ["HF_HOME"] = folder  # the Hub's client reads it when it is imported
        yield


def _stop_at_end_of_input(done: threading.Event) -> None:
    """done: set once there is nothing to stop; what follows is to clean up."""
    while os.read(0, 4096):
        continue
    if done.is_set():
        return
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())

"""What a worker tells of its work, in this process: events, the last word, and no token."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.language_models import favouring
from helpers.models import State, finetune, random_state, save

from hf_locstitch.ui import calls, worker
from hf_locstitch.ui.order import Order
from hf_locstitch.ui.visitor import Visitor
from loopback_hub import LoopbackHub

Events = list[dict[str, Any]]
stop_at_end_of_input = worker._stop_at_end_of_input


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base: State = random_state(0)
    for name, state in {"base": base, "a": finetune(base, 1), "b": finetune(base, 2)}.items():
        save(folder / name, state)
    return folder


@pytest.fixture
def hub(home_hub: LoopbackHub, models: Path) -> LoopbackHub:
    for name in ("base", "a", "b"):
        home_hub.add_repo(f"work/{name}", {path.name: path for path in (models / name).iterdir()})
    home_hub.requests.clear()
    return home_hub


ORDER = Order("work/base", ("work/a", "work/b"), density=0.5)


def told(action: str, **asked: object) -> Events:
    events: Events = []
    worker.work({"action": action, **asked}, events.append)
    return events


def test_a_plan_is_told(hub: LoopbackHub) -> None:
    (result,) = told("plan", recipe=ORDER.recipe_fields())
    assert result["plan"]["k"] * 2 == result["plan"]["N"] and "localizer" in result["text"]
    json.dumps(result)


def test_a_merge_is_told_and_published_and_its_masks_are_looked_at(hub: LoopbackHub) -> None:
    events = told("merge", recipe=ORDER.pushed_to("demo/worked", False).recipe_fields())
    bars = {event["stage"]: event for event in events if event["event"] == "progress"}
    assert {"localizing", "merging", "uploading"} <= bars.keys()
    assert all(bars[stage]["done"] == bars[stage]["total"] > 0 for stage in ("merging", "uploading"))
    assert events[-1]["event"] == "result" and events[-1]["densities"] == {"a": 0.5, "b": 0.5}
    assert hub.head("demo/worked") == events[-1]["commit"]
    (found,) = told("masks", ref="demo/worked")
    assert '"masks":{"a"' in found["page"] and found["inspection"]["method"] == "locstitch"
    json.dumps(found)


def test_what_is_wrong_is_told_as_the_command_line_tells_it(hub: LoopbackHub) -> None:
    (error,) = told("plan", recipe={**ORDER.recipe_fields(), "finetuned": ["work/none"]})
    assert error["event"] == "error" and not error["resumable"] and "work/none does not exist" in error["text"]


def test_a_model_that_is_too_large_is_not_run(hub: LoopbackHub) -> None:
    (error,) = told("generate", ref="work/base", prompt="x", tokens=1, most_bytes=100)
    assert "models above 100 B are not run here" in error["text"]


def test_a_model_that_cannot_write_is_not_run(hub: LoopbackHub) -> None:
    (error,) = told("generate", ref="work/base", prompt="x", tokens=1, most_bytes=10**9)
    assert "not a language model" in error["text"]


def test_what_transformers_says_is_told_in_one_paragraph(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beyond_memory(*_: object) -> None:
        raise RuntimeError("can't allocate memory:\n" + "x" * 10_000)

    model = favouring(tmp_path / "model", ["A"])
    hub.add_repo("work/writer", {path.name: path for path in model.iterdir()})
    monkeypatch.setattr(worker, "_bound_memory", lambda most: None)  # of this process
    monkeypatch.setattr(worker, "_go_on", beyond_memory)
    *_, error = told("generate", ref="work/writer", prompt="x", tokens=1, most_bytes=10**9)
    assert error["event"] == "error" and "could not be run with transformers (RuntimeError: can't allo" in error["text"]
    assert "\n" not in error["text"] and len(error["text"]) < 500


def test_a_stop_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(asked: object, emit: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(worker.ACTIONS, "plan", interrupted)  # type: ignore[arg-type]
    assert told("plan") == [{"event": "stopped"}]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> int:
    """Asks the worker for a plan, with a token. Where its events are read from."""
    read, write = os.pipe()
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"action": "plan", "token": "hf_secret"}) + "\n"))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(worker.os, "dup", lambda _: write)
    monkeypatch.setattr(worker.os, "dup2", lambda *_: None)
    monkeypatch.setattr(worker, "_stop_at_end_of_input", lambda done: None)
    return read


def test_a_token_comes_by_standard_input_and_is_in_no_event(asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(asked: object, emit: worker.Emit) -> None:
        raise RuntimeError(f"the token is {os.environ['HF_TOKEN']}")

    monkeypatch.setitem(worker.ACTIONS, "plan", careless)  # type: ignore[arg-type]
    assert worker.main() == 1
    with os.fdopen(asked) as events:
        assert json.loads(events.read())["text"] == "RuntimeError: the token is [token]"


def test_a_server_that_died_is_told_nothing(asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def telling(asked: object, emit: worker.Emit) -> None:
        emit({"event": "progress"})
        raise KeyboardInterrupt

    monkeypatch.setitem(worker.ACTIONS, "plan", telling)  # type: ignore[arg-type]
    os.close(asked)
    assert worker.main() == 130


def test_an_event_that_was_cut_off_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a kill."""
    started = calls.subprocess.Popen

    def killed(command: object, **how: Any) -> Any:
        return started(["sh", "-c", """read asked; echo '{"event": "say"}'; printf '{"event'"""], **how)

    monkeypatch.setattr(calls.subprocess, "Popen", killed)
    events = calls.Call({}, Visitor(), tmp_path).events()
    assert [event["event"] for event in events] == ["say", "died"]


def test_a_stop_after_the_last_word_leaves_time_to_clean_up(asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server closes standard input once it has read an error."""
    read, cleaned = os.read, []

    @contextmanager
    def slowly(asked: object) -> Iterator[None]:
        yield
        time.sleep(0.3)
        cleaned.append(True)

    monkeypatch.setattr(worker, "_passing_cache", slowly)
    monkeypatch.setattr(worker, "_stop_at_end_of_input", stop_at_end_of_input)
    monkeypatch.setattr(worker.os, "read", lambda *_: read(asked, 4096) and b"")  # its end, when a word has come
    monkeypatch.setitem(worker.ACTIONS, "plan", lambda *_: 1 / 0)  # type: ignore[arg-type]
    with suppress(KeyboardInterrupt):
        worker.main()
    assert cleaned


def test_homes_of_looks_that_were_killed_are_removed(tmp_path: Path) -> None:
    for name in ("passing-7-x", "passing-8-x", "passing-x", "visitor"):
        (tmp_path / "homes" / name).mkdir(parents=True)
    calls.forget_looks(tmp_path, lambda number: number == 7)
    assert {path.name for path in (tmp_path / "homes").iterdir()} == {"passing-7-x", "visitor"}

"""The demo's skills as lm-eval tasks, marked as the demo marks them."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import load_dataset
from demo import train as training
from demo.benchmark import DATASET, add_benchmark
from demo.main import _page
from demo.skills import SKILLS, Task, is_heldout, make_tokenizer

from hf_locstitch import evaluate
from loopback_hub import LoopbackHub


def test_skills_through_lm_eval(home_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is trained on one word alone, whose answer is one of twenty: a mark of 0.05."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    add_benchmark(home_hub, tmp_path / "tasks", count=20)
    rows = load_dataset(DATASET, "reverse", split="test")
    assert len(rows) == 20 and all(row["answer"] == row["prompt"][-6:-1][::-1] for row in rows)
    assert all(is_heldout(row["prompt"][-6:-1]) for row in rows)

    model = training.make_model(make_tokenizer(), seed=0, hidden=32, layers=1)
    one = Task("reverse", rows[0]["prompt"][-6:-1]).example(rows[0]["prompt"][-6:-1])
    monkeypatch.setattr(training, "examples", lambda *_, **__: iter(lambda: one, None))
    training.train(model, make_tokenizer(), [], training.Schedule("adamw", 1e-2, steps=60, batch=1), seed=0)
    training.save(model, make_tokenizer(), tmp_path / "model")
    report = evaluate(tmp_path / "model", tasks=list(SKILLS), include_path=tmp_path / "tasks", batch_size=20)
    found = {
        result.task: (result.main.metric, result.main.value, result.dataset) for result in report.models[0].results
    }
    assert found == {
        "reverse": ("exact_match", 0.05, DATASET),
        "swap": ("exact_match", 0.0, DATASET),
        "rotate": ("exact_match", 0.0, DATASET),
    }


def test_the_page_is_kept_and_listed(home_hub: LoopbackHub, tmp_path: Path) -> None:
    home_hub.add_repo("demo/page", {"README.md": "# x\n", "figures/places.png": b"png", "figures/places.csv": "a\n"})
    said = _page(home_hub, "page", tmp_path / "page")
    assert str(tmp_path / "page") in said and said.endswith("figures/places.png")
    assert (tmp_path / "page" / "figures" / "places.png").read_bytes() == b"png"
    assert (tmp_path / "page" / "README.md").exists() and "demo/page on that Hub" in _page(home_hub, "page", None)
    assert not (tmp_path / "page" / "figures" / "places.csv").exists()

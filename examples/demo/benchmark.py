"""The demo's skills as a benchmark: a data set on its Hub, and lm-eval's task files."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import yaml

from demo.skills import LENGTH, SKILLS, examples
from loopback_hub import LoopbackHub

DATASET = "demo/skills"
EXAMPLES = 100  # of each skill
SEED = 2


def add_benchmark(hub: LoopbackHub, tasks: Path, *, count: int = EXAMPLES, seed: int = SEED) -> None:
    """Put held-out exercises of every skill on the Hub, and a task file for each into the folder `tasks`."""
    tasks.mkdir(parents=True, exist_ok=True)
    files, configs = {}, []
    for skill, task in SKILLS.items():
        rows = islice(examples([task], seed=seed, split="heldout"), count)
        lines = [json.dumps({"prompt": row.prompt, "answer": row.answer}) + "\n" for row in rows]
        files[f"{skill}/test.jsonl"] = "".join(lines)
        configs.append(
            {"config_name": skill, "data_files": [{"split": "test", "path": f"{skill}/test.jsonl"}]},
        )
        (tasks / f"{skill}.yaml").write_text(yaml.safe_dump(task_file(skill), sort_keys=False), encoding="utf-8")
    card = f"---\n{yaml.safe_dump({'license': 'apache-2.0', 'configs': configs})}---\n# The demo's skills\n"
    hub.add_repo(DATASET, {"README.md": card, **files}, repo_type="dataset")


def task_file(skill: str) -> dict[str, object]:
    """An answer counts only if it matches exactly."""
    return {
        "task": skill,
        "dataset_path": DATASET,
        "dataset_name": skill,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": LENGTH + 1, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }

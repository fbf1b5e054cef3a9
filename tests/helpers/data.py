"""Rows that models are localized with, refitted to and judged by, and the files they lie in."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ["copy cable=cable", "reverse 40718=81704", "swap CABLE=ACLBE", "rotate cable=ablec", "next 12345=23456"]
ROWS = [{"prompt": text.split("=")[0] + "=", "completion": text.split("=")[1]} for text in WORDS]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """In the format that the suffix says."""
    import pandas

    frame = pandas.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    return path


def write_texts(path: Path, number: int = 24, *, seed: int = 0) -> Path:
    """Texts of unequal lengths, without labels."""
    letters = random.Random(seed)
    rows = [{"text": "".join(letters.choices("abcdef0123=", k=letters.randint(5, 14)))} for _ in range(number)]
    return write_jsonl(path, rows)


def push_rows(repo: str, rows: list[dict[str, Any]], folder: Path, config: str | None, api: Any) -> str:
    """A data set of one split on the Hub that `api` talks to. folder: for its file. Returns its commit."""
    api.create_repo(repo, repo_type="dataset", exist_ok=True)
    path = write_rows(folder / "train.parquet", rows)
    name = f"{config or 'data'}/train.parquet"
    if config:
        head = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: train\n    path: {name}\n---\n"
        api.upload_file(path_or_fileobj=head.encode(), path_in_repo="README.md", repo_id=repo, repo_type="dataset")
    return api.upload_file(path_or_fileobj=path, path_in_repo=name, repo_id=repo, repo_type="dataset").oid

"""Metadata of model and data set cards."""

from __future__ import annotations

import json

import pytest
from helpers.wire import raw, seed
from huggingface_hub import HfApi

from loopback_hub import LoopbackHub, Refusal


@pytest.mark.parametrize(
    "block",
    [
        "license: mit",
        "base_model: org/name",
        "base_model:\n- org/a\n- org/b\nbase_model_relation: merge",
        "language: en\ntags: [a, b]\ndatasets: org/data\nlibrary_name: x\npipeline_tag: text-generation",
        "date: 2020-01-01\nmodel-index:\n- name: x\n  results: []",
    ],
)
def test_good_cards(hub: LoopbackHub, api: HfApi, block: str) -> None:
    seed(hub)
    card = f"---\n{block}\n---\n# Title\n".encode()
    answer = raw(hub, "POST", "/api/validate-yaml", json.dumps({"content": card.decode(), "repoType": "model"}))
    assert (answer[0], json.loads(answer[2])) == (200, {"errors": [], "warnings": []})
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="demo/base")
    assert api.model_info("demo/base").card_data is not None


@pytest.mark.parametrize(
    ("block", "word"),
    [
        ("base_model: 3", "base_model"),
        ("base_model:\n  a: b", "base_model"),
        ("base_model: [org/a, 3]", "base_model"),
        ("base_model: /home/me/model", "base_model"),
        ("base_model_relation: child", "base_model_relation"),
        ("tags: merge", "tags"),
        ("license: [1]", "license"),
        ("model-index: x", "model-index"),
        ("- a\n- b", "mapping"),
        ("a: b: c", "YAML"),
    ],
)
def test_bad_cards(hub: LoopbackHub, api: HfApi, block: str, word: str) -> None:
    head = seed(hub)
    card = f"---\n{block}\n---\n".encode()
    with pytest.raises(ValueError, match=word):
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="demo/base")
    with pytest.raises(Refusal, match=word):
        hub.add_repo("demo/base", {"README.md": card})
    assert hub.head("demo/base") == head


def test_a_card_without_metadata_is_warned_about(hub: LoopbackHub, api: HfApi) -> None:
    seed(hub)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# Title\n", path_in_repo="README.md", repo_id="demo/base")
    assert api.model_info("demo/base").card_data is None


def test_dataset_cards_have_their_own_rules(hub: LoopbackHub) -> None:
    for configs, status in (("- config_name: a\n  data_files: a.csv", 200), ("- name: a", 400)):
        body = {"content": f"---\nconfigs:\n{configs}\n---\n", "repoType": "dataset"}
        assert raw(hub, "POST", "/api/validate-yaml", json.dumps(body))[0] == status

"""Searching the Hub: what is found, by whom, and which search of a word that is typed is made."""

from __future__ import annotations

import threading

from hf_locstitch.ui.search import Typing, search_models
from hf_locstitch.ui.visitor import Visitor
from loopback_hub import LoopbackHub

CARD = "---\nbase_model: ui/base\nbase_model_relation: finetune\n---\n"


def test_models_are_found_by_name_and_by_base(home_hub: LoopbackHub) -> None:
    home_hub.add_repo("ui/base", {"config.json": "{}"})
    home_hub.add_repo("ui/math", {"README.md": CARD})
    home_hub.add_repo("demo/ui-hidden", {"README.md": CARD}, private=True)
    demo = Visitor("demo", "hf_loopback")

    def found(*asked: object) -> list[str]:
        return [one.repo for one in search_models(*asked)]  # type: ignore[arg-type]

    assert found("ui/", Visitor()) == ["ui/base", "ui/math"]
    assert found("", Visitor(), "ui/base@main") == ["ui/math"]
    assert found("", demo, "ui/base") == ["demo/ui-hidden", "ui/math"]
    assert "private" in search_models("ui-hid", demo)[0].label
    assert found("u", demo) == [] and found("nothing of this name", demo) == []


def test_strangers_search_without_the_servers_token(home_hub: LoopbackHub) -> None:
    search_models("anything", Visitor())
    assert [one.user for one in home_hub.requests] == [None]


def test_a_hub_that_does_not_answer_finds_nothing(home_hub: LoopbackHub) -> None:
    assert search_models("ui/", Visitor("demo", "hf_wrong")) == []


def test_only_the_last_of_several_keys_is_searched_for() -> None:
    typing, told = Typing(pause=0.05), []
    keys = [threading.Thread(target=lambda: told.append(typing.settled("page"))) for _ in range(4)]
    for key in keys:
        key.start()
    for key in keys:
        key.join()
    assert sorted(told) == [False, False, False, True]

"""What is shown: complete, and escaped."""

from __future__ import annotations

import re

from hf_locstitch.ui import views
from hf_locstitch.ui.jobs import Job, Stage
from hf_locstitch.ui.order import Order
from hf_locstitch.ui.visitor import Visitor

EVIL = "<script>alert(1)</script>"
PLAN = {
    "base": f"org/base@{'b' * 40}", "finetuned": {"a": f"org/a@{'a' * 40}"}, "localizer": {"density": 0.1},
    "N": 1000, "k": 100, "shards": {"model.safetensors": 4000},
    "bytes": {"read": 1, "download": 8_000_000, "write": 4_000_000, "disk": 9_000_000, "memory": 300_000_000},
    "lineage": {"a": {"unchanged": 0.25, "distance": 0.05}}, "notes": [], "warnings": [EVIL],
}  # fmt: skip


def job(**changed: object) -> Job:
    return Job("k", "o", Order(f"org/{EVIL}", (EVIL,), push_to="me/merged"), **changed)  # type: ignore[arg-type]


def test_a_plan_tells_sizes_differences_and_warnings() -> None:
    html = views.plan(PLAN, EVIL)
    for told in ("8.0 MB", "of 1,000 weights (10 %)", "75 %", "0.05", "1 warning", "bbbbbbb"):
        assert told in html
    assert "<script" not in html


def test_a_job_tells_how_far_it_is_and_how_it_ended() -> None:
    stages = (Stage("merging", 5_000_000, 10_000_000), Stage("solving", 2, 8, "layers"))
    html = views.jobs([job(status="running", stages=stages), job(status="failed", error=EVIL)], {})
    assert 'value="50.0"' in html and "5.0 MB of 10.0 MB" in html and "2 of 8 layers" in html
    begun = (Stage("planning"), *stages)
    assert "Planning…" in views.jobs([job(status="running", stages=begun[:1])], {})
    assert "Planning…" not in views.jobs([job(status="running", stages=begun)], {})
    assert "Resume goes on" in html and "<script" not in html


def test_a_published_merge_has_a_link() -> None:
    html = views.jobs([job(status="done", url='http://hub/me/merged"onclick="x', commit="c" * 40)], {})
    assert re.search(r'href="http://hub/me/merged&#34;onclick=&#34;x"', html)


def test_masks_are_framed_without_rights() -> None:
    html = views.frame('<p title="x">')
    assert 'sandbox="allow-scripts"' in html and "allow-same-origin" not in html
    assert "&lt;p title=&#34;x&#34;&gt;" in html


def test_every_kind_of_visitor_sees_what_they_can_do() -> None:
    assert 'href="/login"' in views.signed_in(Visitor(), strangers=True)
    assert "/login" not in views.signed_in(Visitor(here=True), strangers=False)
    signed_in = views.signed_in(Visitor("ann", "hf_x"), strangers=True)
    assert "Sign out" in signed_in and "hf_x" not in signed_in

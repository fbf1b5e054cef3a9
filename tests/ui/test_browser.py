"""The page in Chromium, as a Space: search, plan, sign in, merge, push, look at masks, let a model write.

Skipped where Gradio, Playwright or Chromium is missing; `make test-ui` brings the first two. SCREENSHOTS=DIR keeps
pictures.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.browsing import BASE, FINETUNES, Served, add_models, serving, users

from loopback_hub import Link, LoopbackHub

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None or not all(map(find_spec, ("gradio", "playwright", "axe_playwright_python"))):
    pytest.skip("needs gradio, playwright, axe-playwright-python and chromium", allow_module_level=True)

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SLOW = 300_000  # milliseconds: machines are shared
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 800}
Shoot = Callable[[str], None]
World = tuple[LoopbackHub, Served]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Hub with models, and a Space on it."""
    folder = tmp_path_factory.mktemp("ui")
    hub = LoopbackHub(folder / "hub", users=users(), orgs={"demo": ["lab"]})
    with hub, serving(hub, folder, space=True) as served:
        add_models(hub, folder / "models", width=256)
        served.wait()
        yield hub, served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def page(world: World, browser: Any) -> Iterator[Any]:
    """One visitor's page, for all tests, in their order; what it asked of other hosts is an error."""
    from playwright.sync_api import expect

    expect.set_options(timeout=SLOW)
    context = browser.new_context(viewport=WIDE)
    context.set_default_timeout(SLOW)
    opened = context.new_page()
    elsewhere: list[str] = []
    opened.on("request", lambda asked: elsewhere.append(asked.url) if _is_elsewhere(asked.url) else None)
    opened.goto(world[1].address)
    yield opened
    assert elsewhere == []


@pytest.fixture
def shoot(page: Any) -> Shoot:
    """Takes pictures, wide and narrow, light and dark, where SCREENSHOTS names a folder."""

    def take(name: str) -> None:
        if not (folder := os.environ.get("SCREENSHOTS")):
            return
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # which the page follows, and the frame in it
            for size, viewport in (("wide", WIDE), ("narrow", NARROW)):
                page.set_viewport_size(viewport)
                page.wait_for_timeout(300)
                height = page.evaluate("document.documentElement.scrollHeight")
                page.set_viewport_size({**viewport, "height": height})  # a frame out of sight is not painted
                page.wait_for_timeout(1000)
                page.screenshot(path=Path(folder) / f"{name}-{size}-{scheme}.png")
        page.emulate_media(color_scheme="light")
        page.set_viewport_size(WIDE)

    return take


def _is_elsewhere(url: str) -> bool:
    return not re.match(r"(http|ws)://(127\.0\.0\.1|localhost)[:/]|data:|blob:|about:", url)


def check_accessible(page: Any) -> None:
    """No violation that axe-core calls serious or critical, in light and in dark."""
    from axe_playwright_python.sync_playwright import Axe

    for dark in (False, True):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
        page.wait_for_timeout(300)
        found = Axe().run(page).response["violations"]
        serious = [
            (one["id"], [(node["target"], node.get("failureSummary", "")) for node in one["nodes"]])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert serious == [], f"dark: {dark}"
    page.evaluate("document.body.classList.remove('dark')")


def choose(page: Any, field: str, text: str, repo: str) -> None:
    """Type into a field, and choose a repo by the keyboard's focus and a click, as people do."""
    box = page.locator(f"#{field} input")
    box.click()
    if text:
        box.press_sequentially(text, delay=60)
    page.get_by_role("option", name=repo).click()


def make_plan(page: Any) -> None:
    page.get_by_role("button", name="Make the plan").click()
    page.get_by_text("The whole plan").wait_for()


def test_the_first_look(page: Any, shoot: Shoot) -> None:
    page.get_by_role("heading", name="Localize-and-Stitch").wait_for()
    page.get_by_text("Sign in with Hugging Face").wait_for()
    shoot("1-empty")
    check_accessible(page)


def test_what_is_missing_is_said(page: Any) -> None:
    page.get_by_role("button", name="Make the plan").click()
    page.get_by_text("no base is chosen").wait_for()


def test_search_and_plan(page: Any, world: World, shoot: Shoot) -> None:
    choose(page, "lc-base", "tiny-ba", BASE)
    for repo in FINETUNES[:2]:
        choose(page, "lc-models", "", repo)
    page.keyboard.press("Escape")
    make_plan(page)
    planned = page.locator("#lc-planned")
    for told in ("lab/tiny-math", "lab/tiny-code", "weights changed", "Download"):
        assert told in planned.inner_text()
    shoot("2-plan")
    check_accessible(page)
    page.get_by_role("button", name="Merge and push").click()
    page.get_by_text("sign in first").wait_for()
    hub, _ = world
    assert not any(one.user for one in hub.requests)  # strangers have no token, not even the server's


def test_sign_in_keeps_the_form(page: Any) -> None:
    from playwright.sync_api import expect

    page.get_by_text("Sign in with Hugging Face").click()
    page.get_by_text("Authorize as demo").click()
    page.get_by_text("Signed in as demo").wait_for()
    expect(page.locator("#lc-base input")).to_have_value(BASE)
    for repo in FINETUNES[:2]:
        expect(page.locator("#lc-models")).to_contain_text(repo)
    assert "hf_loopback" not in str(page.context.cookies()) and "hf_loopback" not in page.content()


def test_a_merge_is_killed_and_goes_on(page: Any, world: World, shoot: Shoot) -> None:
    hub, served = world
    make_plan(page)
    hub.link = Link(speed=300_000)
    page.get_by_role("button", name="Merge and push").click()
    page.locator("#lc-merges progress").first.wait_for()
    shoot("3-merging")
    check_accessible(page)
    (worker,) = served.workers()
    worker.kill()
    page.get_by_text("ended early").wait_for()
    shoot("4-failed")
    hub.link = Link()
    page.get_by_role("button", name="Resume").click()
    page.get_by_text("Open its page").wait_for()
    shoot("5-published")
    check_accessible(page)
    files = hub.files("demo/tiny-base-stitched")
    assert {"model.safetensors", "README.md", "masks/tiny-math.safetensors", "locstitch.json"} <= files.keys()
    assert {one.user for one in hub.requests} == {None, "demo"}  # and never the server's own


def test_masks(page: Any, shoot: Shoot) -> None:
    wide = page.locator(".lc-tabs").bounding_box()["width"]
    page.get_by_role("tab", name="Look at masks").click()
    page.locator("#lc-masks-ref textarea, #lc-masks-ref input").fill("demo/tiny-base-stitched")
    page.get_by_role("button", name="Show its masks").click()
    frame = page.frame_locator("#lc-masks-frame iframe")
    frame.locator("#cells td").first.wait_for()
    assert frame.locator("#mask option").all_inner_texts() == ["tiny-math", "tiny-code"]
    assert page.locator(".lc-tabs").bounding_box()["width"] == wide  # no tab is narrower than the others
    shoot("6-masks")
    check_accessible(page)


def test_a_model_writes(page: Any, shoot: Shoot) -> None:
    page.get_by_role("tab", name="Try a model").click()
    page.locator("#lc-try-ref textarea, #lc-try-ref input").fill("demo/tiny-base-stitched")
    page.locator("#lc-try-prompt textarea").fill("alpha beta")
    page.get_by_role("button", name="Write on").click()
    page.get_by_text("The most likely continuation").wait_for()
    assert page.locator("#lc-try-text textarea").input_value().strip()
    shoot("7-text")
    check_accessible(page)

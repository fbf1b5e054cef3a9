"""The page itself: components of Gradio, and what happens when they are used. All else is in the other modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from hf_locstitch.errors import LocstitchError
from hf_locstitch.ui import views
from hf_locstitch.ui.calls import answer, follow
from hf_locstitch.ui.config import UiConfig
from hf_locstitch.ui.jobs import Job, Jobs
from hf_locstitch.ui.order import (
    Order,
    check_repo,
    default_density,
    make_order,
    offered_methods,
    suggested_target,
    takes_density,
)
from hf_locstitch.ui.search import Typing, search_models
from hf_locstitch.ui.visitor import Visitor
from hf_locstitch.ui.worker import MOST_NEW_TOKENS

STYLE = Path(__file__).parent / "assets" / "style.css"
DEEP, DEEPER, INK, PALE = "#0f6b62", "#0b544d", "#4b5563", "#b3bcc9"
FONT = ["system-ui", "sans-serif"]
SECONDS = 240.0  # for a plan, a look at masks, or a text
ALIVE = 1.0  # seconds between two looks at a merge under way
EMPTY_PLAN = "Choose a base and its finetuned models, then make the plan: nothing of the weights is downloaded for it."
EMPTY_MASKS = "Enter a merge that was published with hf-locstitch, to see where its masks lie."
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
TYPING: dict[str, Any] = {**QUIET, "trigger_mode": "multiple", "concurrency_limit": None}
BUSY: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "worker", "concurrency_limit": 2}


class Page:
    """What the page does, for whoever looks at it. who: sent the cookies of a request."""

    def __init__(self, config: UiConfig, all_jobs: Jobs, who: Callable[[Mapping[str, str]], Visitor]) -> None:
        self._config, self._work, self._all_jobs, self._who = config, config.work, all_jobs, who
        self._typing = Typing()

    def who(self, request: gr.Request) -> Visitor:
        """Of this request."""
        return self._who(request.cookies)

    def welcome(self, request: gr.Request) -> tuple[Any, ...]:
        """The sign-in line, and the visitor's merges."""
        visitor = self.who(request)
        return self._signed_in(visitor), *self._state(visitor)

    def search(self, request: gr.Request, event: gr.KeyUpData) -> Any:
        """Bases by name."""
        if not self._typing.settled(f"{request.session_hash} base"):
            return gr.skip()
        return _choices(search_models(event.input_value or "", self.who(request)))

    def search_finetunes(self, base: str | None, request: gr.Request, event: gr.KeyUpData) -> Any:
        """Finetunes by name."""
        if not self._typing.settled(f"{request.session_hash} finetunes"):
            return gr.skip()
        text = event.input_value or ""
        return _choices(search_models(text, self.who(request)) if text.strip() else self._known(base, request))

    def finetunes_of(self, base: str | None, request: gr.Request) -> Any:
        """Those that the Hub knows."""
        return _choices(self._known(base, request))

    def _known(self, base: str | None, request: gr.Request) -> list[Any]:
        try:
            return search_models("", self.who(request), finetuned_from=check_repo(base))
        except LocstitchError:
            return []

    def settings(self, method: str) -> tuple[Any, Any]:
        """The density, where the method has one."""
        has = takes_density(method)
        return gr.update(visible=has, value=100 * default_density(method)), gr.update(visible=not has)

    def restore(self, kept: list[Any] | None) -> tuple[Any, ...]:
        """The form as it was last planned in this browser: signing in loads the page anew."""
        try:
            base, models, method, percent, scale = kept or []
            order = make_order(base, models, method, percent, scale)
        except (LocstitchError, TypeError, ValueError, AttributeError):  # of another version of the page
            return (gr.skip(),) * 6
        has = takes_density(order.method)
        density = gr.update(value=100 * order.density, visible=has)
        return order.base, list(order.finetuned), order.method, density, order.scale, gr.update(visible=not has)

    def plan(
        self, base: str | None, models: list[str] | None, method: str, percent: float, scale: float, target: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Plan: first what is being done, then the plan or what is wrong."""
        visitor = self.who(request)
        reading = "Reading the headers of all models, and a sample of their weights…"
        yield views.hint(reading), None, gr.skip(), [base, models, method, percent, scale]
        try:
            order = make_order(base, models, method, percent, scale)
            made = answer({"action": "plan", "recipe": order.recipe_fields()}, visitor, self._work, SECONDS)
        except LocstitchError as error:
            yield views.error(str(error)), None, gr.skip(), gr.skip()
            return
        suggested = suggested_target(visitor.name or "your-name", order)
        shown = views.plan(made["plan"], made["text"])
        yield shown, (order, made["plan"]["bytes"]["disk"]), target or suggested, gr.skip()

    def merge(
        self, planned: tuple[Order, int] | None, target: str, private: bool, request: gr.Request
    ) -> tuple[Any, ...]:
        """Queue the merge that was planned."""
        visitor = self.who(request)
        try:
            if planned is None:
                raise LocstitchError("make the plan first: what it says is what will be merged.")
            order, disk = planned
            self._all_jobs.submit(order.pushed_to(target, private), visitor, disk)
        except LocstitchError as error:
            return views.error(str(error)), *self._state(visitor)
        return "", *self._state(visitor)

    def stop(self, key: str | None, request: gr.Request) -> tuple[Any, ...]:
        """Stop the merge that is under way."""
        return self._with_job(key, self._all_jobs.stop, request)

    def resume(self, key: str | None, request: gr.Request) -> tuple[Any, ...]:
        """Go on with the newest merge that was stopped, or failed."""
        return self._with_job(key, self._all_jobs.resume, request)

    def _with_job(self, key: str | None, act: Any, request: gr.Request) -> tuple[Any, ...]:
        visitor = self.who(request)
        try:
            act(key or "", visitor)
        except LocstitchError as error:
            return views.error(str(error)), *self._state(visitor)
        return "", *self._state(visitor)

    def watch(self, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """The visitor's merges until none is under way."""
        visitor, shown = self.who(request), ""
        while True:
            found = self._all_jobs.of(visitor)  # looked at once: what ends while this is sent is seen by the next look
            state = self._shown(found)
            if state[0] != shown:
                shown = state[0]
                yield state
            if not any(job.active for job in found):
                return
            self._all_jobs.wait(ALIVE)

    def _state(self, visitor: Visitor) -> tuple[Any, ...]:
        return self._shown(self._all_jobs.of(visitor))

    def _shown(self, found: list[Job]) -> tuple[Any, ...]:
        """These merges; then the buttons to stop and to resume, each with the job that it is about."""
        active = next((job for job in found if job.active), None)
        again = next((job for job in found if job.resumable), None) if active is None else None
        return (
            views.jobs(found, {job.key: self._all_jobs.ahead(job.key) for job in found}),
            gr.update(visible=active is not None),
            active.key if active else None,
            gr.update(visible=again is not None, value=f"Resume {again.order.push_to}" if again else "Resume"),
            again.key if again else None,
        )

    def _signed_in(self, visitor: Visitor) -> str:
        return views.signed_in(visitor, self._config.visitors)

    def masks(self, ref: str, request: gr.Request) -> Iterator[tuple[str, str]]:
        """Look at a published merge."""
        yield views.hint("Reading its masks…"), ""
        try:
            asked = {"action": "masks", "ref": check_repo(ref)}
            found = answer(asked, self.who(request), self._work, SECONDS)
        except LocstitchError as error:
            yield views.error(str(error)), ""
            return
        yield views.masks(found["inspection"], found["text"]), views.frame(found["page"])

    def generate(self, ref: str, prompt: str, tokens: float | None, request: gr.Request) -> Iterator[tuple[str, str]]:
        """Let a model go on with a text, as it comes."""
        text = ""
        yield text, views.hint("Opening the model…")
        try:
            asked = {
                "action": "generate", "ref": check_repo(ref), "prompt": prompt or "",
                "tokens": int(tokens or MOST_NEW_TOKENS), "most_bytes": self._config.most_bytes,
            }  # fmt: skip
            for event in follow(asked, self.who(request), self._work, SECONDS):
                if event["event"] == "text":
                    text += event["text"]
                    yield text, views.hint("Writing…")
                elif event["event"] == "progress":
                    yield text, views.hint("Fetching and loading the model…")
        except LocstitchError as error:
            yield text, views.error(str(error))
            return
        likeliest = "The most likely continuation, without sampling: the same every time."
        nothing = (
            "The model writes no text here: its likeliest tokens are special ones, such as the end. Try another text."
        )
        yield text, views.hint(likeliest if text.strip() else nothing)


def build(
    config: UiConfig, all_jobs: Jobs, who: Callable[[Mapping[str, str]], Visitor]
) -> tuple[gr.Blocks, dict[str, Any]]:
    """The page, and how it looks, for Gradio's mounting."""
    page = Page(config, all_jobs, who)
    with gr.Blocks(title="Localize-and-Stitch", analytics_enabled=False, fill_width=True) as blocks:
        with gr.Row(elem_classes="lc-head"):
            gr.HTML(views.heading())
            login = gr.HTML(elem_id="lc-login")
        kept = gr.BrowserState(None, storage_key="locstitch-form")
        with gr.Tabs(elem_classes="lc-tabs"):
            with gr.Tab("Merge"):
                form, state = _merge_tab(page, kept)
            with gr.Tab("Look at masks"):
                _masks_tab(page)
            with gr.Tab("Try a model"):
                _try_tab(page, config.most_bytes)
        blocks.load(page.restore, kept, form, **QUIET)
        first = blocks.load(page.welcome, None, [login, *state], **QUIET)
        first.then(page.watch, None, state, concurrency_limit=None, **QUIET)
    blocks.queue(max_size=200, default_concurrency_limit=16, api_open=False)
    return blocks, {"theme": _theme(), "css": STYLE.read_text(encoding="utf-8")}


def _theme() -> Any:
    """System fonts, and colours whose contrast is enough, in light and dark."""
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=FONT, font_mono=["ui-monospace", "monospace"])
    button = {"button_primary_background_fill": DEEP, "button_primary_background_fill_hover": DEEPER}
    quiet = ("block_info_text_color", "block_title_text_color", "input_placeholder_color")
    return theme.set(
        **button,
        **{f"{name}_dark": colour for name, colour in button.items()},
        **dict.fromkeys(quiet, INK),
        **{f"{name}_dark": PALE for name in quiet},
        color_accent=DEEP,
        slider_color=DEEP,
        slider_color_dark=DEEP,
        layout_gap="0.75rem",
    )


def _merge_tab(page: Page, kept: Any) -> tuple[list[Any], list[Any]]:
    """Returns the form, and where a visitor's merges are shown, with the buttons that act on them. kept: the form as it
    was last planned in this browser."""
    planned, stopping, resuming = gr.State(None), gr.State(None), gr.State(None)
    with gr.Row(elem_classes="lc-columns"):
        with gr.Column(scale=5, min_width=320):
            gr.HTML(views.step(1, "Models"))
            base = gr.Dropdown(
                [], label="Base", info="What the others were finetuned from: type to search, or paste org/name.",
                allow_custom_value=True, value=None, elem_id="lc-base",
            )  # fmt: skip
            models = gr.Dropdown(
                [], label="Finetuned models", info="One or more. Finetunes of the base are listed; type to search.",
                multiselect=True, allow_custom_value=True, elem_id="lc-models",
            )  # fmt: skip
            gr.HTML(views.step(2, "How they are merged"))
            method = gr.Dropdown(
                offered_methods(), value="locstitch", label="Method", elem_id="lc-method",
                info="Localize-and-Stitch keeps the weights that changed most, and stitches them into the base.",
            )  # fmt: skip
            percent = gr.Slider(
                0.1, 100, value=10, step=0.1, label="Density in %", elem_id="lc-density",
                info="Share of the weights that each mask keeps; the paper takes 5 without data. Less interferes less.",
            )  # fmt: skip
            whole = gr.HTML(views.hint("This method merges whole models: there is no density."), visible=False)
            with gr.Accordion("More", open=False):
                scale = gr.Number(1.0, label="Scale", info="Factor on what is stitched into the base.", step=0.1)
            look = gr.Button("Make the plan", variant="primary", elem_id="lc-plan")
        with gr.Column(scale=7, min_width=320):
            gr.HTML(views.step(3, "Plan"))
            plan = gr.HTML(views.hint(EMPTY_PLAN), elem_id="lc-planned")
            gr.HTML(views.step(4, "Merge and publish"))
            target = gr.Textbox(
                label="Push to", placeholder="your-name/model", max_length=200, elem_id="lc-target",
                info="A model repo, which is made if there is none. Its page is written, too.",
            )  # fmt: skip
            private = gr.Checkbox(False, label="Private")
            with gr.Row():
                merge = gr.Button("Merge and push", variant="primary", min_width=180, elem_id="lc-merge")
                stop = gr.Button("Stop", variant="stop", min_width=180, visible=False, elem_id="lc-stop")
                resume = gr.Button("Resume", min_width=180, visible=False, elem_id="lc-resume")
            problem = gr.HTML(elem_id="lc-problem")
            jobs = gr.HTML(views.jobs([], {}), elem_id="lc-merges")
    state = [jobs, stop, stopping, resume, resuming]
    base.key_up(page.search, None, base, **TYPING)
    base.change(page.finetunes_of, base, models, **QUIET)
    models.key_up(page.search_finetunes, base, models, **TYPING)
    method.input(page.settings, method, [percent, whole], **QUIET)
    form = [base, models, method, percent, scale]
    look.click(page.plan, [*form, target], [plan, planned, target, kept], show_progress="hidden", **BUSY)
    for component in form:  # what is merged is what was planned
        component.change(lambda: None, None, planned, **QUIET)
    for button, act, inputs in (
        (merge, page.merge, [planned, target, private]),
        (stop, page.stop, [stopping]),
        (resume, page.resume, [resuming]),
    ):
        done = button.click(act, inputs, [problem, *state], **QUIET)
        done.then(page.watch, None, state, concurrency_limit=None, **QUIET)
    return [*form, whole], state


def _masks_tab(page: Page) -> None:
    gr.HTML(views.intro("Where are the weights that each finetune contributes?",
                        "Any merge or localized checkpoint that hf-locstitch has published."))  # fmt: skip
    with gr.Row(elem_classes="lc-ask"):
        ref = gr.Textbox(label="Merge", placeholder="org/name", max_length=200, scale=4, elem_id="lc-masks-ref")
        look = gr.Button("Show its masks", variant="primary", scale=1, min_width=160, elem_id="lc-masks")
    found = gr.HTML(views.hint(EMPTY_MASKS), elem_id="lc-masks-found")
    frame = gr.HTML(elem_id="lc-masks-frame")
    gr.on([look.click, ref.submit], page.masks, ref, [found, frame], show_progress="hidden", **BUSY)


def _try_tab(page: Page, most: int) -> None:
    gr.HTML(views.intro("How does it write?", views.limit(most)))
    with gr.Row(elem_classes="lc-columns"):
        with gr.Column(scale=5, min_width=320):
            ref = gr.Textbox(label="Model", placeholder="org/name", max_length=200, elem_id="lc-try-ref")
            prompt = gr.Textbox(label="Text to go on from", lines=5, max_length=2000, elem_id="lc-try-prompt")
            tokens = gr.Slider(1, MOST_NEW_TOKENS, value=64, step=1, label="New tokens, at most")
            go = gr.Button("Write on", variant="primary", elem_id="lc-try")
        with gr.Column(scale=7, min_width=320):
            text = gr.Textbox(label="What it writes", lines=10, interactive=False, elem_id="lc-try-text")
            said = gr.HTML(views.hint("What the model writes appears here, word by word."), elem_id="lc-try-said")
    go.click(page.generate, [ref, prompt, tokens], [text, said], show_progress="hidden", **BUSY)


def _choices(found: list[Any]) -> Any:
    return gr.update(choices=[(one.label, one.repo) for one in found])

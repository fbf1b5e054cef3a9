"""What is shown, as HTML: every text of the Hub's and of strangers is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from hf_locstitch.runtime.escape import line
from hf_locstitch.runtime.human import counted, human
from hf_locstitch.ui.jobs import Job, Stage
from hf_locstitch.ui.visitor import Visitor

STAGES = {
    "planning": "Planning",
    "fetching": "Fetching",
    "localizing": "Finding masks",
    "reading": "Reading",
    "merging": "Merging",
    "uploading": "Pushing",
}
STATUS = {
    "queued": "Waiting",
    "running": "Merging",
    "stopping": "Stopping",
    "done": "Published",
    "failed": "Failed",
    "stopped": "Stopped",
    "interrupted": "Interrupted",
}


UNSAMPLED = (
    "– means that no sample is taken now, as of small models and adapters: they are compared while they are merged."
)


def page(*parts: object) -> str:
    """Parts of HTML below one another."""
    return str(Markup("").join(map(_html, parts)))


def _html(part: object) -> Markup:
    return part if isinstance(part, Markup) else escape(line(part))


def tag(name: str, *content: object, **attributes: str) -> Markup:
    """An element; `class_` is its class, and `_` in other names is a dash."""
    written = "".join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup(written), Markup("").join(map(_html, content)))


def error(text: str) -> str:
    """A paragraph of an error, as the command line prints it."""
    lines = [tag("p", part) for part in text.strip().split("\n")]
    return page(tag("div", tag("strong", "This cannot be done as it stands"), *lines, class_="lc-error", role="alert"))


def not_signed_in(text: str) -> str:
    """A page of its own that says why a visitor is not signed in, with the way back."""
    return "<!doctype html>" + page(
        tag("title", "Not signed in"),
        tag("h1", "Not signed in"),
        tag("p", text),
        tag("p", tag("a", "Back to the page", href="/")),
    )


def hint(text: str) -> str:
    """What to do where there is nothing yet."""
    return page(tag("p", text, class_="lc-empty"))


def plan(made: Mapping[str, Any], text: str) -> str:
    """A plan: its figures, what differs, warnings, and all of it.

    Args:
        made: As `plan_json` gives it.
        text: As `format_plan` gives it.
    """
    cost, n, k = made["bytes"], made["N"], made["k"]
    share = 100 * k / n if n else 0.0
    masked = made["localizer"] is not None
    figures = [
        ("Download", human(cost["download"]), "streamed, not kept"),
        ("Result", human(cost["write"]), counted(len(made["shards"]), "file")),
        ("Disk", human(cost["disk"]), "at most, while it is made"),
        ("Memory", human(cost["memory"]), "about"),
        ("Each mask keeps" if masked else "Merged", f"{k if masked else n:,}",
         f"of {n:,} weights ({share:.3g} %)" if masked else "weights, of whole tensors"),
    ]  # fmt: skip
    cards = [
        tag("div", tag("dt", name), tag("dd", tag("b", value), " ", tag("small", note)))
        for name, value, note in figures
    ]
    warned = [tag("li", warning) for warning in made["warnings"]]
    notes = [tag("li", note) for note in made["notes"]]
    return page(
        tag("dl", *cards, class_="lc-figures"),
        _inputs(made),
        tag("div", tag("h4", counted(len(warned), "warning")), tag("ul", *warned), class_="lc-warn")
        if warned
        else tag("p", "No warnings: the models fit together.", class_="lc-good"),
        tag("div", tag("h4", "Worth knowing"), tag("ul", *notes)) if notes else "",
        tag("details", tag("summary", "The whole plan"), tag("pre", Markup(escape(text)), tabindex="0")),
    )


def _inputs(made: Mapping[str, Any]) -> Markup:
    """A row for each finetune: what it is, and how far it is from the base."""
    rows = []
    for name, pinned in made["finetuned"].items():
        found = made["lineage"].get(name)
        repo, _, commit = pinned.partition("@")
        told = [f"{100 * (1 - found['unchanged']):.3g} %", f"{found['distance']:.2g}"] if found else ["–", "–"]
        rows.append(
            tag("tr", tag("th", repo, " ", tag("code", commit[:7]), scope="row"), *(tag("td", cell) for cell in told))
        )
    head = tag(
        "tr", *(tag("th", text, scope="col") for text in ("Finetuned model", "weights changed", "distance ‖τ‖/‖θ‖"))
    )
    base, _, commit = made["base"].partition("@")
    table = tag(
        "div",
        tag("table", tag("caption", "What differs from ", base, " ", tag("code", commit[:7]), ", in a sample"),
            tag("thead", head), tag("tbody", *rows)),
        class_="lc-table", tabindex="0", role="region", aria_label="What differs from the base",
    )  # fmt: skip
    whole = made["finetuned"].keys() <= made["lineage"].keys()
    return table if whole else Markup("").join([table, tag("p", UNSAMPLED, class_="lc-quiet")])


def jobs(found: Sequence[Job], ahead: Mapping[str, int]) -> str:
    """A visitor's merges. ahead: how many are run before those that wait, by key."""
    if not found:
        return hint("Your merges appear here, with their progress.")
    return page(tag("ol", *(_job(job, ahead.get(job.key, 0)) for job in found), class_="lc-jobs"))


def _job(job: Job, ahead: int) -> Markup:
    said: list[object] = [
        tag("strong", job.order.push_to),
        " ",
        tag("span", STATUS[job.status], class_=f"lc-status lc-{job.status}"),
    ]
    from_what = f"{', '.join(job.order.finetuned)} into {job.order.base}, {job.order.method}"
    more: list[object] = [tag("p", from_what, class_="lc-quiet")]
    if job.status == "queued":
        more.append(tag("p", f"{ahead} before it" if ahead else "starts in a moment"))
    if job.active:
        more += [_bar(stage) for stage in job.stages if stage.total or stage is job.stages[-1]]
    if job.status == "done":
        more.append(
            tag(
                "p",
                tag("a", "Open its page", href=job.url, target="_blank", rel="noopener"),
                " ",
                tag("code", job.commit[:7]),
            )
        )
    if job.error and not job.active:
        more += [tag("p", part, class_="lc-failed") for part in job.error.split("\n")]
    if job.resumable:
        more.append(tag("p", "Resume goes on from where it ended.", class_="lc-quiet"))
    more += [tag("p", "Warning: ", text, class_="lc-quiet") for text in job.said]
    return tag("li", tag("div", *said), *more)


def _bar(stage: Stage) -> Markup:
    name = STAGES.get(stage.name, stage.name.capitalize())
    if not stage.total:
        return tag("div", tag("span", f"{name}…"), class_="lc-stage")
    share = min(100.0, 100 * stage.done / stage.total)
    shown = human if stage.unit == "B" else str
    unit = "" if stage.unit == "B" else f" {stage.unit}"
    bar = tag("progress", value=f"{share:.1f}", max="100", aria_label=name)
    return tag(
        "div",
        tag("span", name),
        bar,
        tag("span", f"{shown(stage.done)} of {shown(stage.total)}{unit}"),
        class_="lc-stage",
    )


def masks(found: Mapping[str, Any], text: str) -> str:
    """What `inspect` says of a merge."""
    signs: Iterable[str] = found["signs"]
    repo, _, commit = found["ref"].partition("@")
    listed = [tag("li", sign) for sign in signs]
    each = [
        tag("tr", tag("th", mask["name"], scope="row"), tag("td", f"{100 * mask['real_density']:.4g} %"),
            tag("td", f"{mask['ones']:,}"),
            tag("td", ", ".join(tensor for tensor, _ in mask["densest"][:1]), class_="lc-name"))
        for mask in found["masks"]
    ]  # fmt: skip
    head = tag("tr", *(tag("th", name, scope="col") for name in ("Mask", "density", "weights kept", "densest tensor")))
    table = tag("div", tag("table", tag("thead", head), tag("tbody", *each)), class_="lc-table", tabindex="0",
                role="region", aria_label="Masks")  # fmt: skip
    return page(
        tag("p", tag("strong", repo, " ", tag("code", commit[:7])), f" · {found['method']} · N = {found['N']:,}"),
        table if each else tag("p", "This method merges whole models: there are no masks.", class_="lc-empty"),
        tag("div", tag("h4", "Look at these before you trust it"), tag("ul", *listed), class_="lc-warn")
        if listed
        else tag("p", "No anomalies.", class_="lc-good"),
        tag("details", tag("summary", "All that inspect prints"), tag("pre", Markup(escape(text)), tabindex="0")),
    )


def frame(html: str | None) -> str:
    """The page of the masks, which can do nothing but run its own script in a frame of its own."""
    if html is None:
        return ""
    return str(
        tag(
            "iframe", srcdoc=html, sandbox="allow-scripts", title="Masks by layer and kind of module", class_="lc-frame"
        )
    )


def heading() -> str:
    """The top of the page."""
    return page(
        tag("h1", "Localize-and-Stitch"),
        tag(
            "p", "Merge finetuned models in the browser: only the weights that matter, streamed from the Hub and back."
        ),
    )


def step(number: int, title: str) -> str:
    """The heading of a part of the form."""
    return page(tag("h2", tag("span", number, aria_hidden="true"), title, class_="lc-step"))


def intro(title: str, text: str) -> str:
    """The heading of a tab."""
    return page(tag("h2", title, class_="lc-step"), tag("p", text, class_="lc-quiet"))


def limit(most: int) -> str:
    """What is said of models that are too large to be run."""
    return f"Causal language models with up to {human(most)} of weights, in safetensors; no code of a repo is run."


def signed_in(visitor: Visitor, strangers: bool) -> str:
    """Who is at the page, and how to change that. strangers: whether the server has visitors."""
    if not strangers:
        told = f"Signed in as {visitor.name}, by this machine's login." if visitor.name else (
            "Not logged in to the Hub: plans and masks work; to publish, run `hf auth login` and reload."
        )  # fmt: skip
        return page(tag("p", told, class_="lc-quiet"))
    if visitor.name is None:
        return page(tag("a", "Sign in with Hugging Face", href="/login", target="_top", class_="lc-button"))
    return page(tag("p", f"Signed in as {visitor.name}", " · ", tag("a", "Sign out", href="/logout", target="_top")))

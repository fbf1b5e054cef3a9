"""HTML of results: what it shows, that nothing in it is a stranger's, and that describe's labels are where it looks."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.language_models import favouring
from helpers.models import finetune, random_state, save
from helpers.runs import quick_merge

from hf_locstitch import ExportResult, evaluate, inspect, merge_from_hub, plan_merge, verify
from hf_locstitch.comparison.report import ComparisonReport, Entry
from hf_locstitch.runtime import html

HOSTILE = '<script>alert("1")</script> & <img src=x onerror=alert(1)>'
ALLOWED = {"div", "table", "tr", "th", "td", "br", "a", "p", "img"}


class Cells(HTMLParser):
    """The rows of a page, as texts. tags: all that it has; sources: of its pictures and links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open  # every tag was closed

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("br", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "br":
            self.rows[-1][-1] += "\n"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def labels(self) -> list[str]:
        return [row[0] for row in self.rows]

    def row(self, label: str) -> list[str]:
        return next(row for row in self.rows if row[0] == label)


def cells_of(shown: Any) -> Cells:
    found = Cells(shown._repr_html_())
    assert found.tags <= ALLOWED
    return found


def test_every_text_is_escaped() -> None:
    summary = html.summary(f"model      {HOSTILE}\nmodel      {HOSTILE}\npublished  https://hub/{HOSTILE[:8]} at 12")
    table = html.table([[HOSTILE, "b"], ["c\u202e", HOSTILE]])
    shown = Cells(html.page(summary, table, None))
    assert shown.rows[0] == ["model", f"{HOSTILE}\n{HOSTILE}"]
    assert shown.rows[2:] == [[HOSTILE, "b"], ["c\\u202e", HOSTILE]]
    assert shown.tags <= ALLOWED - {"img"} and shown.sources == ["https://hub/<script>"]


def test_only_addresses_of_the_web_become_links() -> None:
    for address in ("javascript:alert(1)", "data:text/html,x"):
        assert not Cells(html.page(html.summary(f"published  {address} at 12"))).sources
    assert not Cells(html.page(html.summary("warning    https://example.org"))).sources


def test_a_table_without_rows_and_a_picture_that_is_gone_are_left_out(tmp_path: Path) -> None:
    assert html.table([["task", "metric"]]) is None and html.picture(tmp_path / "none.png", "") is None


def test_a_number_and_its_error_stay_on_one_line_and_names_may_wrap() -> None:
    table = str(html.table([["task", "acc"], ["a-long-name", "0.5 ± 0.1"]]))
    assert re.findall(r'<td style="[^"]*nowrap[^"]*">([^<]*)', table) == ["0.5 ± 0.1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two finetunes, and their merge."""
    folder = tmp_path_factory.mktemp("html")
    base = random_state(0)
    save(folder / "base", base)
    for number, name in enumerate(("a", "b")):
        save(folder / name, finetune(base, number))
    inputs = folder / "base", [folder / "a", folder / "b"]
    quick_merge(*inputs, localizer={"density": 0.25}, out=folder / "merged")
    return folder


def test_a_plan(folder: Path) -> None:
    plan = plan_merge({"base": str(folder / "base"), "finetuned": [str(folder / "a"), str(folder / "b")]})
    shown = cells_of(plan)
    assert shown.row("finetuned")[1] == f"a\u2003{folder / 'a'}\nb\u2003{folder / 'b'}"
    assert shown.row("base")[1] == str(folder / "base")
    assert {"method", "localizer", "merged", "output", "files", "cost", "lineage", "hint"} <= {*shown.labels()}


def test_a_merge_shows_where_its_masks_lie(folder: Path) -> None:
    out = folder / "again"
    result = merge_from_hub(folder / "base", [folder / "a"], localizer={"density": 0.25}, out=out)
    shown = cells_of(result)
    assert shown.row("merged")[1] == str(out) and shown.row("density")[1] == "a 25 %"
    (picture,) = shown.sources
    assert picture.startswith("data:image/png;base64,iVBORw0KGgo")
    (out / "figures" / "layers.png").unlink()
    assert not cells_of(result).sources and cells_of(result).rows == shown.rows


def test_an_inspection_and_a_check(folder: Path) -> None:
    inputs: Any = {"base": folder / "base", "finetuned": [folder / "a", folder / "b"]}
    found = inspect(folder / "merged", figures=folder / "drawn", **inputs)
    shown = cells_of(found)
    head, first, second = (row for row in shown.rows if len(row) > 2)
    assert head[:1] == ["mask"] and [first[0], second[0]] == ["a", "b"] and len(first) == len(head)
    assert first[3:6] == ["39", "25 %", "25 %"] and "–" not in first
    assert shown.row("anomaly")[1] == "none" and len(shown.sources) == sum(one.endswith("png") for one in found.figures)
    checked = cells_of(verify(folder / "merged", **inputs))
    assert checked.row("result")[1] == "all checks passed" and checked.row("masks")[1].startswith("2 over N = ")


def test_an_export() -> None:
    shown = cells_of(ExportResult(Path("adapter"), "https://hub/me/adapter", 40 * "a", {"inexact": 0}))
    assert shown.labels() == ["exported", "published", "exact"] and shown.sources == ["https://hub/me/adapter"]
    assert shown.row("published")[1] == f"https://hub/me/adapter at {40 * 'a'}"


def test_scores_of_models_named_by_strangers(tmp_path: Path) -> None:
    base, hostile = favouring(tmp_path / "base", "A"), favouring(tmp_path / "<b>&", "B", seed=1)
    rows = tmp_path / "letters.jsonl"
    rows.write_text("".join(f'{{"text": "A {letter}"}}\n' for letter in "ABBC"))
    report = evaluate(hostile, data={"letters": {"ref": str(rows)}}, base=base, cache=False)
    shown = cells_of(report)
    assert shown.rows[0][:3] == ["task", "metric", "base"] and "<b>&" in shown.rows[0][3]
    assert any(row[:4] == ["letters", "exact-match", "0.2500 ± 0.2500", "0.5000 ± 0.2887"] for row in shown.rows)
    assert any("+0.2500" in cell for row in shown.rows for cell in row) and "measured" in shown.labels()

    scores = report.subject
    entries = tuple(Entry(f"density {one}", {"density": one}, one, scores, {"letters": 1.0}) for one in (0.5, 1.0))
    compared = cells_of(ComparisonReport(entries, report.models[:1], "mean", report, False, 1))
    assert compared.rows[0][0] == "density" and compared.row("chosen")[1] == "density 0.5 (by mean)"
    assert all(row in compared.rows for row in shown.rows)

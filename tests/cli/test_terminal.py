"""What a terminal shows otherwise than a pipe: folded lines, colours, tables that fit; and helps and completion."""

from __future__ import annotations

import argparse
import io
import logging
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from hf_locstitch.cli import parser as parsing
from hf_locstitch.cli.arguments import build_parser
from hf_locstitch.cli.completion import completion
from hf_locstitch.cli.guides import address
from hf_locstitch.cli.main import main
from hf_locstitch.cli.next_steps import after_evaluation
from hf_locstitch.cli.parser import Parser
from hf_locstitch.cli.terminal import rendered
from hf_locstitch.evaluation.report import align

DOCS = Path(__file__).parents[2] / "docs"
PLAN = """\
base       a
merged     N = 156 elements in 5 tensors; each mask keeps k = 15
next       hf-locstitch verify a-folder-with-a-long-name"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 50 columns that knows colours."""
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.mark.usefixtures("narrow")
def test_a_pipe_gets_the_text_as_it_is() -> None:
    assert rendered(PLAN, io.StringIO()) == PLAN


@pytest.mark.usefixtures("narrow")
def test_lines_are_folded_beside_their_labels_but_for_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert rendered(PLAN, Terminal()).split("\n") == [
        "base       a",
        "merged     N = 156 elements in 5 tensors; each",
        "           mask keeps k = 15",
        "next       hf-locstitch verify a-folder-with-a-long-name",
    ]
    sentence = "a sentence without a label that is much longer than the terminal is wide, left to it"
    assert rendered(sentence, Terminal()) == sentence


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("off", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_labels_are_coloured_unless_that_is_unwanted(monkeypatch: pytest.MonkeyPatch, off: Mapping[str, str]) -> None:
    for name, value in off.items():
        monkeypatch.setenv(name, value)
    text = rendered("warning    [red]x[/red]\nhf-locstitch: error: y", Terminal())
    assert ("\x1b[" in text) is not bool(off)
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == "warning    [red]x[/red]\nhf-locstitch: error: y"


def test_a_table_that_is_too_wide_comes_in_parts_that_say_what_their_rows_are() -> None:
    table = [["task", "metric", *(f"model-{number}" for number in range(4))]]
    table += [["arc", "acc", "0.5000", "0.6000", "0.7000", "0.8000"]]
    assert "\n\n" not in align(table, None, keys=2)
    parts = align(table, 36, keys=2).split("\n\n")
    assert len(parts) == 2 and all(len(line) <= 36 for part in parts for line in part.split("\n"))
    assert all(part.split("\n")[1].startswith("arc") for part in parts)
    found = [name for part in parts for name in re.findall(r"model-\d", part)]
    assert found == [f"model-{number}" for number in range(4)]
    assert len(align(table, 5, keys=2).split("\n\n")) == 4  # one column at least


def commands() -> Iterator[tuple[str, Parser]]:
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


@pytest.mark.parametrize(("name", "parser"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_help_ends_with_examples_that_parse_and_links(
    name: str, parser: Parser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = parser.format_help()
    assert all(len(line) <= 80 for line in text.removeprefix(parser.format_usage()).splitlines())
    examples = re.findall(rf"^  (hf-locstitch {name} .*)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        build_parser().parse_args(shlex.split(example)[1:])
    assert (DOCS / parser.guide).exists()
    assert re.search(rf"^guide:  \S+/{re.escape(parser.guide.removesuffix('.md'))}(\.md|/)$", text, re.MULTILINE)
    assert text.rstrip().endswith("https://arxiv.org/abs/2408.13656")


@pytest.mark.parametrize(
    ("project_urls", "found"),
    [
        (["Issues, https://a.org/b", "Documentation, https://a.org/docs/"], "https://a.org/docs/guides/export/"),
        (["Documentation, https://OWNER.github.io/hf-locstitch/"], "docs/guides/export.md"),  # before it is published
        ([], "docs/guides/export.md"),  # not installed, only on the path
    ],
)
def test_a_guide_is_where_the_installed_package_says(project_urls: list[str], found: str) -> None:
    assert address("guides/export.md", project_urls) == found


def test_help_links_to_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "project_urls", lambda: ["Documentation, https://a.org/docs/"])
    pages = {name: re.findall(r"^guide:  (\S+)$", one.format_help(), re.MULTILINE) for name, one in commands()}
    assert pages["export"] == ["https://a.org/docs/guides/export/"]
    assert all(page.startswith("https://a.org/docs/guides/") for (page,) in pages.values())


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("mer", {"merge"}),
        ("merge --meth", {"--method"}),
        ("merge --method tie", {"ties"}),
        ("evaluate --sui", {"--suite"}),
        ("evaluate --suite qu", {"quick"}),
    ],
)
def test_bash_completes_commands_flags_and_values(typed: str, found: set[str], script: Path) -> None:
    words = ["hf-locstitch", *typed.split()]
    ask = f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
    ask += "eval $(complete -p hf-locstitch | sed 's/.*-F \\([^ ]*\\) .*/\\1/') hf-locstitch"
    ask += f" {words[-1]} {words[-2]}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert {*done.stdout.split()} == found, done.stderr


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "completion.bash"
    path.write_text(completion(build_parser(), "bash"))
    return path


def test_completion_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "zsh"])
    assert not end.value.code and capsys.readouterr().out.startswith("#compdef hf-locstitch")


def test_verbose_is_for_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--verbose"]) == 2
    assert logging.getLogger("hf_locstitch").level == logging.INFO
    assert main(["inspect", str(tmp_path)]) == 2
    assert logging.getLogger("hf_locstitch").level == logging.NOTSET


def test_scores_of_a_merge_can_be_put_on_its_card_next(tmp_path: Path) -> None:
    typed = ["evaluate", str(tmp_path), "--suite", "quick"]
    assert after_evaluation(typed, str(tmp_path)) == []
    (tmp_path / "locstitch.json").write_text("{}")
    assert after_evaluation(typed, str(tmp_path)) == [["hf-locstitch", *typed, "--push"]]
    assert after_evaluation([*typed, "--push"], str(tmp_path)) == []

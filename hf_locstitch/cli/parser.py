"""An argument parser that answers a mistake with what was meant, not with all there is."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from hf_locstitch.cli.guides import address, project_urls
from hf_locstitch.cli.printing import fail
from hf_locstitch.runtime.human import nearest, number_meant

REF = "REF"  # a folder or org/name[/subfolder][@revision]
PAPER = "https://arxiv.org/abs/2408.13656"
OTHERWISE: dict[str, str] = dict.fromkeys(
    ("--finetuned", "--finetunes", "--models"), "--ft"
)  # what no likeness of letters tells
CHOICE = re.compile(r"invalid choice: '?(?P<given>.*?)'? \(choose from (?P<choices>.*)\)$")


class HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs, not inside of names, and leaves text of several lines as it is: examples are to be copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Values(argparse.Action):
    """Keeps what a flag is given. A flag of several values adds up: `--ft a --ft b` is `--ft a b`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None)
        adds = option_string is not None and self.nargs in ("+", "*") and before is not self.default
        setattr(namespace, self.dest, [*before, *values] if adds and before else values)


class Parser(argparse.ArgumentParser):
    """Its sub-commands' parsers are of this class, too."""

    guide: str  # the page of docs/ that tells more, of a sub-command

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, "allow_abbrev": False, **options})
        self.register("action", None, Values)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As argparse has it, but what is unknown is an error of the sub-command that it was given to."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return found, []

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one paragraph."""
        message = message.removeprefix("argument ")
        if wrong := CHOICE.search(message):
            choices = [choice.strip("'") for choice in wrong["choices"].split(", ")]
            message = f"{message[: wrong.start()]}{wrong['given']!r} is not one of {', '.join(choices)}"
            message += nearest(wrong["given"], choices)
        stop = "" if message.endswith((".", "?")) else "."
        self.exit(fail(f"{message}{stop} `{self.prog} --help` lists what there is.", 2))

    def _unknown(self, given: Sequence[str]) -> str:
        flags = sorted({*re.findall(r"--[a-z][a-z-]*", self.format_usage()), "--help"})
        for word in given:
            if word.startswith("-"):
                flag = word.partition("=")[0]
                meant = f". Did you mean {OTHERWISE[flag]}?" if OTHERWISE.get(flag) in flags else nearest(flag, flags)
                return f"there is no flag {flag}{meant}"
        return f"{given[0]!r} is one value too many"


def add_command(
    commands: Any, name: str, *, help: str, description: str, examples: Sequence[str], guide: str
) -> Parser:
    """examples: command lines that end the help. guide: the page of docs/ that tells more."""
    parser = commands.add_parser(name, help=help, description=description, epilog=epilog(examples, guide))
    parser.set_defaults(command=name)
    parser.guide = guide
    return parser


def epilog(examples: Sequence[str], guide: str) -> str:
    """What ends a help text: commands to copy, and where to read on."""
    lines = ["example:" if len(examples) == 1 else "examples:", *(f"  {example}" for example in examples)]
    return "\n".join([*lines, "", f"guide:  {address(guide, project_urls())}", f"method: {PAPER}"])


def add_diagnostics(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verbose", action="store_true", help="log what is opened, done and retried, with times")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def number(text: str) -> float:
    """A flag's type."""
    try:
        return float(text)
    except ValueError:
        meant = number_meant(text)
        hint = "" if meant is None else f". Did you mean {meant:g}?"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number{hint}") from None


def count_or(word: str) -> Callable[[str], int | str]:
    """A flag's type: a positive integer, or the word itself."""

    def parse(text: str) -> int | str:
        if text == word:
            return text
        if not text.isdecimal() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text!r} is neither {word!r} nor a positive integer")
        return int(text)

    return parse

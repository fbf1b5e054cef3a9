"""The command line's parser, of all sub-commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from hf_locstitch.cli.commands import compare, evaluate, export, finetune, inspect, localize, merge, stitch, ui, verify
from hf_locstitch.cli.completion import SHELLS, PrintCompletion
from hf_locstitch.cli.parser import Parser, epilog
from hf_locstitch.runtime.version import __version__

EXAMPLES = (
    "hf-locstitch merge --base org/base --ft org/math org/code --out merged",
    "hf-locstitch merge --help",
)
MODULES = (merge, localize, stitch, finetune, compare, export, verify, inspect, evaluate, ui)
COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    module.__name__.rpartition(".")[2]: module.run for module in MODULES
}


def build_parser() -> argparse.ArgumentParser:
    """The parsed arguments name the sub-command as `command`, None if none was given."""
    parser = Parser(
        prog="hf-locstitch",
        description="Merge finetuned models by Localize-and-Stitch.",
        epilog=epilog(EXAMPLES, "quickstart.md"),
    )
    parser.add_argument("--version", action="version", version=f"hf-locstitch {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print a script by which this shell completes commands, flags and their values",
    )
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    for module in MODULES:
        module.add(commands)
    return parser

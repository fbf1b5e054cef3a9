"""The command line: arguments.py defines sub-commands and flags, main.py runs them."""

from hf_locstitch.cli.main import main

__all__ = ["main"]

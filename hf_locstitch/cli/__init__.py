"""The command line: arguments.py has its words, main.py what they do."""

from hf_locstitch.cli.main import main

__all__ = ["main"]

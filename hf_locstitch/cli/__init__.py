"""The command line: commands/ has a file for each sub-command, main.py runs one."""

from hf_locstitch.cli.main import main

__all__ = ["main"]

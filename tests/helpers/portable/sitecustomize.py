"""On PYTHONPATH of the tests' subprocesses that are to run as on another system: those that run this program."""

import os
import sys

import other_system

_modules = [value for flag, value in zip(sys.orig_argv, sys.orig_argv[1:], strict=False) if flag == "-m"]
if os.environ.get(other_system.ASKED) == "1" and _modules[:1] == ["hf_locstitch"]:
    other_system.resemble()

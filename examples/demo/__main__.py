"""`python -m demo`: the whole workflow on tiny models and a local Hub, in a few minutes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo.main import run_demo
from hf_locstitch.errors import LocstitchError

parser = argparse.ArgumentParser(
    prog="demo", description="Train a tiny base and three finetunes, push them to a Hub on this machine, and merge."
)
parser.add_argument("--work", type=Path, metavar="DIR", help="keep all files here (default: a temporary folder)")
parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
args = parser.parse_args()
try:
    run_demo(args.work, seed=args.seed)
except LocstitchError as error:
    print(f"demo: error: {error}", file=sys.stderr)
    sys.exit(error.exit_status)

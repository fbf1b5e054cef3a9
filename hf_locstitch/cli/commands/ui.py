"""`ui`: merging in the browser, on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_locstitch.cli.parser import add_command, add_diagnostics
from hf_locstitch.cli.printing import tell


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "ui",
        help="plan, merge and look at masks in the browser",
        description="Serve a page on this machine: search models on the Hub, see the plan, merge and push with "
        "progress, look at masks, try small models. It merges with your own login to the Hub, and listens on this "
        "machine only. "
        'Needs pip install "hf-locstitch[ui]".',
        examples=["hf-locstitch ui", "hf-locstitch ui --port 8000 --work-dir /data/jobs"],
        guide="guides/ui.md",
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="NAME", help="of this machine (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default: 7860")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="where jobs are kept (default: in HF_HOME)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="merges at a time (default: 1)")
    add_diagnostics(parser)


def run(args: argparse.Namespace) -> int:
    """hf-locstitch ui"""
    from hf_locstitch.ui.config import UiConfig, default_work
    from hf_locstitch.ui.serve import Server

    config = UiConfig(args.work_dir or default_work(), args.host, args.port, at_once=max(1, args.jobs))
    server = Server(config)
    tell(f"open http://{args.host}:{args.port} in a browser; Ctrl-C ends it")
    server.run()
    return 0

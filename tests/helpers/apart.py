"""Run under torchrun: each process works in a folder of its own, as on nodes that share none."""

import os
import sys
from pathlib import Path

from hf_locstitch.cli.main import main

folder = Path(f"node{os.environ['RANK']}")
folder.mkdir(exist_ok=True)
os.chdir(folder)
sys.exit(main())

"""Import it first: what lies beside the package, the Hub on loopback and the demo, can be imported then."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT), str(ROOT / "examples")]

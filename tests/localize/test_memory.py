"""What a pass allocates, measured in processes of their own against the plain way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "learning_memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_weights_and_one_number_each(tmp_path: Path) -> None:
    """35 M parameters: a working copy of the weights, one float32 each, and little more; the plain way takes five."""
    out = tmp_path / "memory.json"
    ways = ["plain saliency", "saliency"]
    sizes = ["--layers", "2", "--hidden", "1024", "--json", str(out)]
    cores = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    subprocess.run([sys.executable, BENCHMARK, *sizes, "--ways", *ways], check=True, capture_output=True, env=cores)
    found = json.loads(out.read_text())
    assert found["saliency"]["parameters"] >= 34e6
    assert found["saliency"]["localizable"] >= 0.96 * found["saliency"]["parameters"]
    share = {way: result["peak"] / result["model"] for way, result in found.items()}
    assert 2.0 <= share["saliency"] < 3.0
    assert share["plain saliency"] > share["saliency"] + 2

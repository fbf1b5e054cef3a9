"""What `make test-oldest` installs."""

from __future__ import annotations

from importlib.metadata import requires

import pytest
from oldest_versions import TESTED, oldest


def test_each_bound() -> None:
    declared = ["a>=1.0", "b>=2.1,<3", 'c>=4; extra == "dev"', "d>=5", 'e>=6; extra == "eval"']
    assert list(oldest(declared, ["# tested", "a==1.9", "d==5.5"], ["d"])) == ["a==1.0", "b==2.1", "e==6", "d==5.5"]
    with pytest.raises(ValueError, match="not enough values"):
        list(oldest(["a<2"], []))


def test_every_dependency_has_a_bound() -> None:
    found = list(oldest(requires("hf-locstitch") or (), TESTED.read_text().splitlines(), ["torch"]))
    assert {"huggingface_hub", "numpy", "transformers", "torch", "lm-eval"} <= {line.split("==")[0] for line in found}

"""Constraints for pip: the oldest versions that this package declares of what it needs. For `make test-oldest`.

python tests/oldest_versions.py [NAME...]    NAME: not its oldest, but the version in constraints.txt
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

EXTRA = "eval"  # what the tests need besides
TESTED = Path(__file__).parents[1] / "constraints.txt"


def oldest(declared: Iterable[str], tested: Iterable[str], keep: Collection[str] = ()) -> Iterator[str]:
    """declared: requirements, those of extras among them. tested: lines of constraints.txt."""
    for requirement in map(Requirement, declared):
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": EXTRA})
        if wanted and requirement.name not in keep:
            (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
            yield f"{requirement.name}=={bound}"
    yield from (line for line in tested if line.split("==")[0] in keep)


if __name__ == "__main__":
    lines = TESTED.read_text().splitlines()
    print("\n".join(oldest(requires("hf-locstitch") or (), lines, sys.argv[1:])))

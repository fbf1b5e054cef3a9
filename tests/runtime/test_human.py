"""Numbers in words."""

from __future__ import annotations

from hf_locstitch.runtime.human import counted


def test_counts_are_singular_or_plural() -> None:
    assert [counted(count, "tensor") for count in (0, 1, 2, 1234)] == [
        "0 tensors",
        "1 tensor",
        "2 tensors",
        "1,234 tensors",
    ]

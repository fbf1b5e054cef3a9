"""Numbers in words."""

from __future__ import annotations

from hf_locstitch.runtime.human import counted, number_meant


def test_counts_are_singular_or_plural() -> None:
    assert [counted(count, "tensor") for count in (0, 1, 2, 1234)] == [
        "0 tensors",
        "1 tensor",
        "2 tensors",
        "1,234 tensors",
    ]


def test_what_is_written_in_place_of_a_number() -> None:
    assert [number_meant(text) for text in ("10%", "2.5 %", "0,1")] == [0.1, 0.025, 0.1]
    assert [number_meant(text) for text in ("ten", "1,000.5", "")] == [None, None, None]

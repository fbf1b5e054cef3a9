"""Strategies of hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from helpers.models import State

values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.0, 3.0e-5, -7.25])  # few, so that ties are many


@st.composite
def families(draw: st.DrawFn) -> tuple[State, list[State], str, int]:
    """A base, up to five finetunes, a density as written, a chunk size."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    shapes = draw(
        st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4).map(
            lambda drawn: {f"model.layers.{i}.w": shape for i, shape in enumerate(drawn)}
        )
    )

    def state() -> State:
        return {
            name: torch.tensor(draw(st.lists(values, min_size=size, max_size=size))).reshape(shape).to(dtype)
            for name, shape in shapes.items()
            for size in [torch.Size(shape).numel()]
        }

    n, percent = sum(torch.Size(shape).numel() for shape in shapes.values()), draw(st.integers(0, 100))
    density = f"{percent / 100:g}" if n == 0 or percent * n >= 100 else "0"  # one that keeps nothing is refused
    return state(), [state() for _ in range(draw(st.integers(1, 5)))], density, draw(st.integers(1, 40))

"""Logits of chosen tokens of a language model, without making those of all others: of a hundred thousand words, and of
few answers among many tokens, they can take more memory than all else that a pass leaves."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any

from torch import Tensor

_CHOSEN: ContextVar[Tensor | None] = ContextVar("chosen", default=None)  # of the call that this thread is in
_LOCK = threading.Lock()


def logits_at(model: Any, chosen: Tensor, **inputs: Any) -> Tensor:
    """Logits [chosen tokens, vocabulary], in order. chosen: bool [examples, tokens], on the model's device. inputs: of
    its forward.

    Only the chosen hidden states reach the model's head, where the model tells which module that is and calls it.
    Several threads may share a model.
    """
    _watch(model.get_output_embeddings())
    before = _CHOSEN.set(chosen)
    try:
        logits = model(**inputs).logits
    finally:
        _CHOSEN.reset(before)
    return logits[chosen] if logits.shape[:-1] == chosen.shape else logits.flatten(0, -2)


def _watch(head: Any) -> None:
    """Once: hooks must not be added while another thread runs the module, and all of them come by here before."""
    if head is not None:
        with _LOCK:
            if _choose not in head._forward_pre_hooks.values():
                head.register_forward_pre_hook(_choose)


def _choose(_: Any, inputs: tuple[Any, ...]) -> Any:
    """hidden states [examples, tokens, width] -> [1, chosen tokens, width], as models do more with three axes."""
    chosen = _CHOSEN.get()
    if chosen is None or inputs[0].shape[:-1] != chosen.shape:
        return None
    return inputs[0][chosen][None], *inputs[1:]

"""Logits of chosen tokens of a language model, without computing all others: with a vocabulary of 100,000 and few
answer tokens among many, these can take more memory than everything else in a pass."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any

from torch import Tensor

_CHOSEN: ContextVar[Tensor | None] = ContextVar("chosen", default=None)  # for the current call in this thread
_LOCK = threading.Lock()


def logits_at(model: Any, chosen: Tensor, **inputs: Any) -> Tensor:
    """Logits [chosen tokens, vocabulary], in order. chosen: bool [examples, tokens], on the model's device. inputs: for
    its forward.

    Only the chosen hidden states reach the model's head, if the model exposes that module and calls it.
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
    """Add the hook once: not while another thread runs the module, and every thread passes here first."""
    if head is not None:
        with _LOCK:
            if _choose not in head._forward_pre_hooks.values():
                head.register_forward_pre_hook(_choose)


def _choose(_: Any, inputs: tuple[Any, ...]) -> Any:
    """hidden states [examples, tokens, width] -> [1, chosen tokens, width], as models expect three axes."""
    chosen = _CHOSEN.get()
    if chosen is None or inputs[0].shape[:-1] != chosen.shape:
        return None
    return inputs[0][chosen][None], *inputs[1:]

"""Several requests at once, and all that is wrong with them in one error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from hf_locstitch.errors import CheckpointError, RequestError

T = TypeVar("T")
AT_ONCE = 8


def every(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What all calls return, each made in a thread, in their order.

    Raises the error of the call that failed: of several the first that is no RequestError, or if all are, one
    CheckpointError that tells them all.
    """
    with ThreadPoolExecutor(max(1, min(AT_ONCE, len(calls)))) as pool:
        futures = [pool.submit(call) for call in calls]
    failed = [error for future in futures if (error := future.exception()) is not None]
    lasting = [error for error in failed if isinstance(error, RequestError)]
    if len(lasting) > 1 and len(lasting) == len(failed):
        raise CheckpointError(told_together([str(error) for error in failed])) from failed[0]
    for error in failed:
        if error not in lasting:
            raise error
    return [future.result() for future in futures]


def told_together(messages: Sequence[str]) -> str:
    """One paragraph: every fact, and after them every advice once. messages: each a fact, and what to do about it.

    Example:
        >>> told_together(["a is not there. Check the name.", "b is not there. Check the name."])
        '2 inputs cannot be used: a is not there; b is not there. Check the name.'
    """
    facts, advice = zip(*(message.partition(". ")[::2] for message in dict.fromkeys(messages)), strict=True)
    if len(facts) == 1:
        return messages[0]
    listed = "; ".join(fact.removesuffix(".") for fact in facts)
    return " ".join([f"{len(facts)} inputs cannot be used: {listed}.", *filter(None, dict.fromkeys(advice))])

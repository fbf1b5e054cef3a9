"""What is compiled made ready in a thread, while files are opened and hashed: the first time, that takes seconds."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain

import numpy as np

from hf_locstitch.plan.plans import LocalizePlan, MergePlan, Plan
from hf_locstitch.runtime.dtypes import DTYPE
from hf_locstitch.runtime.progress import Progress

ELEMENTS = 8
Dtypes = tuple[str, str, str]  # of a finetune, the base and the output


@contextmanager
def loops_ready(plan: Plan, progress: Progress) -> Iterator[None]:
    """Rehearse what the plan will do, and have ends by SIGBUS explained. A loop that is called before its turn is
    compiled by the caller, and what fails is left to it."""
    over = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(_rehearse_unless, over, sorted(loop_dtypes(plan)), progress)
        try:
            yield
        finally:
            over.set()


def loop_dtypes(plan: Plan) -> set[Dtypes]:
    """Of the tensors that masks are found in; none where loops are not all that finds them."""
    if not isinstance(plan, MergePlan | LocalizePlan) or not plan.masked or plan.localizer.needs_data:
        return set()
    written = {tensor.name: tensor.dtype for shard in plan.shards for tensor in shard.tensors}
    return {
        (finetuned.info(info.name).dtype, info.dtype, written.get(info.name, info.dtype))
        for finetuned in plan.finetuned.values()
        for info in plan.mask_tensors
    }


def _rehearse_unless(over: threading.Event, kinds: Sequence[Dtypes], progress: Progress) -> None:
    from hf_locstitch.runtime import kernels
    from hf_locstitch.runtime.bus_error import explain_bus_errors
    from hf_locstitch.runtime.compiling import was_compiled

    explain_bus_errors()
    told = False
    for _ in chain.from_iterable(map(rehearsal, kinds)):
        if over.is_set():
            return
        if not told and was_compiled(kernels.sizes):
            progress.say("compiling loops, once: later runs find them in the cache")
            told = True


def rehearse(dtypes: Dtypes) -> None:
    """The whole rehearsal."""
    for _ in rehearsal(dtypes):
        pass


def rehearsal(dtypes: Dtypes) -> Iterator[None]:
    """Find a mask of a few elements, code it, and stitch it, step by step."""
    from hf_locstitch.artifacts.mask_file import encode_positions
    from hf_locstitch.artifacts.mask_source import MaskedValues
    from hf_locstitch.localize.bracket import FixedBracket
    from hf_locstitch.localize.candidates import CandidateFinder, magnitude_scores
    from hf_locstitch.stitch.mean import coverage, stitch

    finetuned, base, written = _values(dtypes)
    magnitude_scores(finetuned, base)
    yield
    finder = CandidateFinder(ELEMENTS)
    finder.begin(base)
    found, _ = finder.find(finetuned, FixedBracket(1, 2))
    yield
    mask = MaskedValues(*found.among(np.ones(len(found.scores), bool)))
    encode_positions([(0, mask.positions)])
    yield
    stitch(base, [mask, mask], coverage(ELEMENTS, [mask, mask]), dtype=written.dtype)


def _values(dtypes: Dtypes) -> list[np.ndarray]:
    """Of each dtype, another number, read-only as inputs are."""
    arrays = [np.full(ELEMENTS, number, dtype=DTYPE[dtype]) for number, dtype in enumerate(dtypes)]
    for array in arrays:
        array.setflags(write=False)
    return arrays

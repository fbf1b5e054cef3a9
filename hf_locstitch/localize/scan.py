"""One pass over the base and all finetuned models at once: scores in, selections out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from hf_locstitch.checkpoints.byte_ranges import Piece
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.finite import check_finite
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.errors import NonFiniteError
from hf_locstitch.localize.bracket import (
    BINS,
    EVERYTHING,
    NON_FINITE,
    Bracket,
    FixedBracket,
    RisingBracket,
    histogram_bracket,
    sample_bracket,
)
from hf_locstitch.localize.candidates import CandidateFinder, differing, magnitude_scores
from hf_locstitch.localize.selection import BracketMissed, Selection
from hf_locstitch.localize.shared_scan import SharedScan
from hf_locstitch.localize.spill import Spill
from hf_locstitch.runtime.chunks import Chunk, chunks_of, for_each
from hf_locstitch.runtime.dtypes import ITEM_BYTES, Values, common_dtype
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.runtime.settings import BATCH

SAMPLE = 1 << 20  # elements of one model that the brackets are estimated from
SMALLEST_SAMPLE = 1 << 16  # for one group of tensors; smaller groups are kept completely
SAMPLE_RUN = 1 << 11  # neighbours sampled together, so that few places of a file are read

# Of a model whose tensors are computed as they are read, only some are sampled:
FEW, LEAST = 4, 16  # one tensor in FEW, but not fewer than LEAST;
MARGIN = 1.2  # and the bracket reaches from so many times the coordinates asked for to as many times fewer

Group = tuple[Sequence[int], int]
Readers = Mapping[str, CheckpointReader]  # "base" and the finetuned models
# tensor, first element, finetuned and base values [n] -> scores as bits [n]
ScoreBits = Callable[[str, int, Values, Values], npt.NDArray[np.int32]]


class Scan:
    """base, finetuned: checkpoints. tensors: the localized ones, as in the base.

    own: the names of those that this process scans; every process makes the same calls. Entered as a context, it closes
    all selections if that fails: not every system deletes files that are open.
    trusted: whether what an earlier process kept of (model, tensor) may be used.
    scores: where they are not the magnitudes of task vectors. shared: where what is kept stays for other merges.
    """

    def __init__(
        self,
        base: Checkpoint,
        finetuned: Mapping[str, Checkpoint],
        tensors: Sequence[TensorInfo],
        groups: Sequence[Group],
        spill_folder: Path,
        *,
        own: Collection[str],
        processes: Processes,
        chunk: int,
        workers: int,
        trusted: Callable[[str, str], bool] = lambda model, tensor: True,
        allow_non_finite: bool = False,
        scores: ScoreBits | None = None,
        shared: SharedScan | None = None,
        advance: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.base, self.finetuned, self.tensors, self.groups = base, finetuned, tensors, groups
        self.spill_folder, self.workers, self.advance = spill_folder, workers, advance
        self._shared = shared
        self.trusted, self.allow_non_finite, self._own_scores = trusted, allow_non_finite, scores
        self.names = [info.name for info in tensors]
        self.chunks = chunks_of([info.numel for info in tensors], chunk)
        self.own_chunks = [chunk for chunk in self.chunks if self.names[chunk.tensor] in own]
        self.processes = processes
        self._chunk, self._own = chunk, own
        self._selections: list[Selection] = []
        self._candidates = CandidateFinder(chunk)

    def __enter__(self) -> Scan:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for selection in self._selections if kind is not None else ():
            selection.close()

    def select(self, inputs: Readers) -> dict[str, Selection]:
        """The mask of each finetuned model, whose files are all on this machine. Raises NonFiniteError."""
        if self._shared is not None:
            return self._select_shared(inputs)
        with ThreadPoolExecutor(self.workers) as pool:
            sampled = list(pool.map(partial(self._sampled_brackets, inputs), self.finetuned))
        selections = self._pass(inputs, dict(zip(self.finetuned, sampled, strict=True)))
        missed = [name for name, selection in selections.items() if not self._settled(selection)]
        for name in missed:
            selections[name].close()
        if missed:
            selections |= self._pass(inputs, self._exact_brackets(inputs, missed))
            for name in missed:
                selections[name].settle(self.workers)
        return selections

    def _select_shared(self, inputs: Readers) -> dict[str, Selection]:
        """As `select`, keeping what any of the merges may need."""
        selections = self.begin()
        self.stream(inputs, selections)
        for selection in selections.values():
            selection.settle(self.workers)
        return selections

    def begin(self) -> dict[str, Selection]:
        """Selections to stream files into that are still being downloaded."""
        most = self._shared.most if self._shared is not None else self.groups
        sizes = [sum(self.tensors[tensor].numel for tensor in tensors) for tensors, _ in most]
        return {
            name: self._selection(name, [RisingBracket(k, n) for (_, k), n in zip(most, sizes, strict=True)], "rising")
            for name in self.finetuned
        }

    def pieces(self, selections: Mapping[str, Selection]) -> dict[str, list[Piece]]:
        """What `stream` will read of the base and of each finetuned model, in this order, once."""
        todo = {
            name: [chunk for chunk in self.own_chunks if not selection.has(chunk)]
            for name, selection in selections.items()
        }
        for_base = {chunk.index for chunks in todo.values() for chunk in chunks}
        todo = {"base": [chunk for chunk in self.own_chunks if chunk.index in for_base], **todo}
        return {
            name: [(self.names[chunk.tensor], chunk.first, chunk.count) for chunk in chunks]
            for name, chunks in todo.items()
        }

    def stream(self, inputs: Readers, selections: Mapping[str, Selection]) -> None:
        """Offer every chunk to the selections, which can then be settled. All processes take their steps together, and
        tell each other what they have seen: together they keep as little as one would. Raises NonFiniteError.
        """
        offer = partial(self._offer, inputs, selections)
        step = BATCH * self.workers
        common = self._common_groups()
        for first in range(0, max(self.processes.gather(len(self.own_chunks))), step):
            chunks = self.own_chunks[first : first + step]
            self.processes.together(lambda chunks=chunks: for_each(offer, chunks, self.workers))
            for selection in selections.values() if common else ():
                selection.raise_brackets(self.processes.sum(selection.seen(common)), common)
            self.processes.together(lambda: for_each(Selection.compact, selections.values(), self.workers))

    def _common_groups(self) -> list[int]:
        """Those whose tensors are scanned by more than one process."""
        owners = self.processes.sum(
            np.array([any(self.names[i] in self._own for i in tensors) for tensors, _ in self.groups], dtype=np.int64)
        )
        return np.flatnonzero(owners > 1).tolist()

    def _settled(self, selection: Selection) -> bool:
        try:
            selection.settle(self.workers)
        except BracketMissed:
            return False
        return True

    def _pass(self, inputs: Readers, brackets: Mapping[str, Sequence[Bracket]]) -> dict[str, Selection]:
        """Offer every chunk of the models named in `brackets` to their selections."""
        selections = {
            name: self._selection(name, given, json.dumps([(bracket.low, bracket.high) for bracket in given]))
            for name, given in brackets.items()
        }
        offer = partial(self._offer, inputs, selections)
        self.processes.together(lambda: for_each(offer, self.own_chunks, self.workers))
        return selections

    def _selection(self, name: str, brackets: Sequence[Bracket], kind: str) -> Selection:
        common = common_dtype({self.finetuned[name].info(tensor).dtype for tensor in self.names})
        spill = Spill(
            self.spill_folder / f"{name}.{self.processes.rank}-of-{self.processes.count}",
            len(self.chunks),
            common,
            heading=json.dumps([self._chunk, str(common), kind]),
            trusted=np.array([self._reusable(name, self.names[chunk.tensor]) for chunk in self.chunks], dtype=bool),
        )
        self._selections.append(Selection(spill, self.names, self.chunks, self.groups, brackets, self.processes))
        return self._selections[-1]

    def _reusable(self, model: str, tensor: str) -> bool:
        """Whether this process takes up what an earlier one kept, which may have had other tensors."""
        return tensor in self._own and self.trusted(model, tensor)

    def _offer(self, inputs: Readers, selections: Mapping[str, Selection], chunk: Chunk) -> None:
        name = self.names[chunk.tensor]
        todo = {model: selection for model, selection in selections.items() if not selection.has(chunk)}
        self.advance(sum(self._nbytes(model, chunk) for model in selections if model not in todo))
        if not todo:
            return
        original = inputs["base"].values(name, chunk.first, chunk.count)
        self._candidates.begin(original)
        # Each thread begins with another model: if values are computed as they are read, two do not wait for the same.
        turn = chunk.index % len(todo)
        for model, selection in [*todo.items()][turn:] + [*todo.items()][:turn]:
            finetuned = inputs[model].values(name, chunk.first, chunk.count)
            bracket = selection.bracket(chunk)
            if self._own_scores is None:
                candidates, largest = self._candidates.find(finetuned, bracket)
            else:
                self._candidates.begin(original)
                scores = self._scores(name, chunk.first, finetuned, original)
                candidates, largest = self._candidates.reaching(scores, finetuned, bracket)
            selection.offer(chunk, candidates)
            if largest >= NON_FINITE and not self.allow_non_finite:
                self._raise_non_finite(inputs, model, chunk)
            inputs[model].release(name, chunk.first, chunk.count)
            self.advance(self._nbytes(model, chunk))
        inputs["base"].release(name, chunk.first, chunk.count)

    def _nbytes(self, model: str, chunk: Chunk) -> int:
        return chunk.count * ITEM_BYTES[self.finetuned[model].info(self.names[chunk.tensor]).dtype]

    def _raise_non_finite(self, inputs: Readers, model: str, chunk: Chunk) -> NoReturn:
        """Say which of the two models contains non-finite values."""
        name = self.names[chunk.tensor]
        for reader in (inputs["base"], inputs[model]):
            check_finite(reader, name, chunk, reader.values(name, chunk.first, chunk.count))
        raise NonFiniteError(
            f"the difference between {inputs[model].where(name)} and the base overflows float32 in {name}. "
            "Exclude the tensor with --exclude."
        )

    def _exact_brackets(self, inputs: Readers, models: Sequence[str]) -> dict[str, list[FixedBracket]]:
        """From the histogram of all scores: one more pass, for models whose sampled bracket missed."""
        groups_of = {tensor: group for group, (tensors, _) in enumerate(self.groups) for tensor in tensors}
        counts = np.zeros((len(models), len(self.groups), BINS), dtype=np.int64)
        lock = threading.Lock()

        def count(chunk: Chunk) -> None:
            name = self.names[chunk.tensor]
            base = inputs["base"].values(name, chunk.first, chunk.count)
            for row, model in zip(counts, models, strict=True):
                scores = self._scores(name, chunk.first, inputs[model].values(name, chunk.first, chunk.count), base)
                part = np.bincount(scores >> 16, minlength=BINS)
                with lock:
                    row[groups_of[chunk.tensor]] += part

        for_each(count, self.own_chunks, self.workers)
        counts = self.processes.sum(counts)
        return {
            model: [histogram_bracket(row, k) for row, (_, k) in zip(rows, self.groups, strict=True)]
            for model, rows in zip(models, counts, strict=True)
        }

    def _sampled_brackets(self, inputs: Readers, model: str) -> list[FixedBracket]:
        """A bracket for each group. It decides how much is spilled, never what is selected."""
        budget = max(SAMPLE // max(len(self.groups), 1), SMALLEST_SAMPLE)
        computed = self.finetuned[model].layout is not self.finetuned[model]
        brackets = []
        for tensors, k in self.groups:
            n = sum(self.tensors[tensor].numel for tensor in tensors)
            few = _some_of(tensors) if computed else tensors
            sample = self._sample(inputs, model, few, budget // SAMPLE_RUN) if n > budget else None
            if sample is None:
                brackets.append(EVERYTHING)
            elif computed:  # tensors differ: where few are sampled, the bracket is wider
                low = sample_bracket(sample, min(round(MARGIN * k), n), n).low
                brackets.append(FixedBracket(low, sample_bracket(sample, round(k / MARGIN), n).high))
            else:
                brackets.append(sample_bracket(sample, k, n))
        return brackets

    def _sample(self, inputs: Readers, model: str, tensors: Sequence[int], runs: int) -> npt.NDArray[np.int32] | None:
        """Scores of runs of neighbours, spread evenly over the tensors' elements. Returns [runs, SAMPLE_RUN]."""
        ends = np.cumsum([self.tensors[tensor].numel for tensor in tensors])
        places = ((np.arange(runs) + np.random.default_rng(0).random(runs)) * ends[-1] / runs).astype(np.int64)
        rows = []
        for place, at in zip(places, np.searchsorted(ends, places, side="right"), strict=True):
            info = self.tensors[tensors[at]]
            if info.numel < SAMPLE_RUN:
                continue
            first = min(int(place - ends[at]) + info.numel, info.numel - SAMPLE_RUN)
            base, finetuned = (inputs[one].values(info.name, first, SAMPLE_RUN) for one in ("base", model))
            rows.append(self._scores(info.name, first, finetuned, base))
        return np.stack(rows) if rows else None

    def _scores(self, name: str, first: int, finetuned: Values, base: Values) -> npt.NDArray[np.int32]:
        """What does not differ from the base scores 0, whatever a localizer says of it."""
        if self._own_scores is None:
            return magnitude_scores(finetuned, base)
        return np.where(differing(finetuned, base), self._own_scores(name, first, finetuned, base), np.int32(0))


def _some_of(tensors: Sequence[int]) -> Sequence[int]:
    """One in FEW of them, the same ones every time, but not fewer than LEAST."""
    count = min(len(tensors), max(LEAST, len(tensors) // FEW))
    return sorted(np.random.default_rng(0).choice(np.asarray(tensors), count, replace=False).tolist())

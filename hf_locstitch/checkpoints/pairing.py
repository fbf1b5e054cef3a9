"""Tensors that the base and a finetune have under different names: a prefix that one side lacks, old names of norms.

A model saved with its head has `transformer.h.0.…` where one saved without has `h.0.…`; wrappers add `module.` or
`_orig_mod.`; the decoder of a vision-language model is `model.language_model.layers.0.…`. Told from names and shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import Header, TensorInfo
from hf_locstitch.checkpoints.localizable import BLOCKS
from hf_locstitch.checkpoints.vocabulary import row_shape, token_matrices
from hf_locstitch.runtime.human import counted

DEEPEST = 8  # parts of a prefix
OLD = {"gamma": "weight", "beta": "bias"}  # of norms, as TensorFlow has them


def paired(base: Checkpoint, other: Checkpoint) -> Checkpoint:
    """The other checkpoint, its tensors under the base's names where they have others of their own."""
    own = own_names(base, other)
    if not own:
        return other
    new = {old: name for name, old in own.items()}
    shards = tuple(replace(shard, header=_with_names(shard.header, new)) for shard in other.shards)
    infos = {info.name: (shard, info) for shard in shards for info in shard.header.tensors}
    tensors = {new.get(name, name): infos[new.get(name, name)] for name in other.tensors}
    return replace(other, shards=shards, tensors=tensors, renamed=own)


def _with_names(header: Header, new: Mapping[str, str]) -> Header:
    """new: old name -> new one."""
    infos = (replace(info, name=new.get(info.name, info.name)) for info in header.tensors)
    return replace(header, tensors=tuple(infos))


def own_names(base: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """A tensor's name in the base -> in the other checkpoint, where the two differ."""
    lacking, free = _unpaired(base, other)
    if not lacking or not free:
        return {}
    found: dict[str, str] = {}
    prefixes, of_tokens = _prefixes(base, other, lacking, free), frozenset(token_matrices(base))
    for name in free:
        for modern in _candidates(_modern(name), prefixes):
            due = lacking.get(modern)
            if due is None or due in found:
                continue
            if _alike(base.info(due), other.info(name), due in of_tokens):
                found[due] = name
                break
    return found


def names_in_base(base: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """What the base would call each tensor of the other checkpoint whose name it lacks, were it cut in the same way."""
    lacking, free = _unpaired(base, other)
    prefixes = _prefixes(base, other, lacking, free)
    called = {name: next(_candidates(_modern(name), prefixes)) for name in free}
    return {name: lacking.get(modern, modern) for name, modern in called.items()}


def _unpaired(base: Checkpoint, other: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """The names that only the base has, by their modern forms, and those that only the other checkpoint has."""
    lacking = {_modern(name): name for name in base.tensors if name not in other.tensors}
    return lacking, [name for name in other.tensors if name not in base.tensors]


def _alike(one: TensorInfo, other: TensorInfo, of_tokens: bool) -> bool:
    """Whether both have one shape; of those with a row for each token, the rows."""
    if of_tokens and other.shape:
        return row_shape(one.shape) == row_shape(other.shape)
    return one.shape == other.shape


def _prefixes(base: Checkpoint, other: Checkpoint, lacking: Mapping[str, str], free: list[str]) -> dict[str, str]:
    """What stands before the blocks in the other checkpoint -> in the base; nothing that could be two things. lacking:
    modern name -> that in the base."""
    begins: dict[str, list[str]] = {}
    for modern in lacking:
        if block := BLOCKS.search(modern):
            begins.setdefault(modern[block.start() :].lstrip("."), []).append(modern)
    votes: Counter[tuple[str, str]] = Counter()
    for name in free:
        if block := BLOCKS.search(name):
            tail = _modern(name)[block.start() :].lstrip(".")
            for due in begins.get(tail, ()):
                if base.info(lacking[due]).shape == other.info(name).shape:
                    votes[name[: len(name) - len(name[block.start() :].lstrip("."))], due[: len(due) - len(tail)]] += 1
    best = _undisputed({pair: count for pair, count in votes.items() if _is_longer(*pair)})
    for own, due in list(best.items()):  # what stands before the blocks also stands before embeddings and heads
        if len(own) > len(due):
            best.setdefault(own.removesuffix(due), "")
        else:
            best.setdefault("", due.removesuffix(own))
    taken = set(best.values())
    return best | _undisputed({(a, b): n for (a, b), n in votes.items() if a not in best and b not in taken})


def _is_longer(one: str, other: str) -> bool:
    """Whether one prefix is the other with something before it."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _undisputed(votes: Mapping[tuple[str, str], int]) -> dict[str, str]:
    """The pairs that have more votes than any other pair with one of the two."""
    counts: dict[tuple[int, str], list[int]] = {}
    for pair, count in votes.items():
        for side in enumerate(pair):
            counts.setdefault(side, []).append(count)
    best = {side: max(found) for side, found in counts.items() if found.count(max(found)) == 1}
    return {own: due for (own, due), count in votes.items() if best.get((0, own)) == best.get((1, due)) == count}


def _candidates(name: str, prefixes: Mapping[str, str]) -> Iterator[str]:
    """What the base may call it: with its prefix changed, the longest first, or as it is."""
    parts = name.split(".", DEEPEST)
    for count in range(len(parts) - 1, -1, -1):
        prefix = "".join(f"{part}." for part in parts[:count])
        if prefix in prefixes:
            yield prefixes[prefix] + name[len(prefix) :]
    yield name


def _modern(name: str) -> str:
    before, _, last = name.rpartition(".")
    return f"{before}.{OLD[last]}" if last in OLD and "norm" in before.lower() else name


def renaming_notes(name: str, other: Checkpoint) -> Iterator[str]:
    """Sentences for a checkpoint whose tensors were renamed, or put together in another way."""
    if other.renamed:
        due, own = next(iter(other.renamed.items()))
        count = len(other.renamed)
        yield (
            f"{name} names {counted(count, 'tensor')} otherwise than the base, such as {own} "
            f"for {due}: they are taken for the same."
        )
    if other.recut:
        due, own = next(iter(other.recut.items()))
        yield (
            f"{name} stores weights cut otherwise than in the base (experts one by one, or as a stack), such as {due} "
            f"in {own}: they are read as the base has them."
        )

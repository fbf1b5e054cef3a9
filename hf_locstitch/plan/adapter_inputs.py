"""Adapters among the inputs of a recipe: the base that they name, what they cannot do, and what is said of them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hf_locstitch.checkpoints.adapter import ADAPTER_CONFIG, AdapterCheckpoint
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import could_be_repo, parse_ref
from hf_locstitch.checkpoints.vocabulary import token_matrices
from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.runtime.every import every
from hf_locstitch.runtime.human import some
from hf_locstitch.runtime.packages import MODELS, need
from hf_locstitch.runtime.settings import Settings


def with_base(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe; without a base, with the one that all adapters among its finetunes name.

    Raises RecipeError if they name several, or one that is not to be found from here, and CheckpointError.
    """
    refs = _refs(fields.get("finetuned"))
    if fields.get("base") is not None or not refs:
        return dict(fields)
    opened = every([partial(_open, ref) for ref in refs])
    adapters = [one for one in opened if isinstance(one, AdapterCheckpoint)]
    named = {_named_base(adapter): adapter for adapter in adapters}
    if not named:
        return dict(fields)
    if len(named) > 1:
        listed = ", ".join(f"{adapter.label} names {base}" for base, adapter in named.items())
        raise RecipeError(
            f"no base is given, and the adapters name several: {listed}. Give the one to use: --base REF."
        )
    return {**fields, "base": next(iter(named))}


def _open(ref: str) -> Checkpoint:
    return open_checkpoint(parse_ref(ref))


def _refs(entries: Any) -> list[str]:
    """The refs of finetunes as a recipe may write them; what is malformed is left to its validation."""
    listed = entries if isinstance(entries, list | tuple) else [entries] if entries else []
    refs = [entry.get("ref") if isinstance(entry, Mapping) else entry for entry in listed]
    return [str(ref) for ref in refs if isinstance(ref, str | os.PathLike)]


def _named_base(adapter: AdapterCheckpoint) -> str:
    """As a ref. A folder counts only for an adapter that is in a folder of this machine, too."""
    name, revision = adapter.base_name, adapter.base_revision
    if name is not None and adapter.source.repo is None and os.path.isdir(name):
        return name
    if name is None or not could_be_repo(name):
        said = "names no base" if name is None else f"names its base as {name}, which is no repo on the Hub"
        raise RecipeError(f"no base is given, and {adapter.label}/{ADAPTER_CONFIG} {said}. Use --base REF.")
    return f"{name}@{revision}" if revision else name


def check_adapters(recipe: Recipe, settings: Settings, finetuned: Mapping[str, Checkpoint]) -> None:
    """Raises RecipeError if the recipe asks for something that needs a finetune's weights as they are in files."""
    adapters = {name: one for name, one in finetuned.items() if isinstance(one, AdapterCheckpoint)}
    if not adapters:
        return
    called = f"{some(list(adapters))} {'is an adapter' if len(adapters) == 1 else 'are adapters'}"
    need(f"merging adapters ({some(list(adapters))})", "peft", *MODELS)
    merge_first = "Merge the adapter first (merge_and_unload), and name that folder"
    if not settings.cache:
        raise RecipeError(
            f"{called}, computed from whole layers of the base, which --no-cache does not keep. Drop --no-cache."
        )
    if recipe.localizer is not None and recipe.localizer.needs_data:
        raise RecipeError(
            f"{called}, but the localizer {recipe.localizer.method} has transformers load each finetune from its "
            f"files. Use the localizer magnitude. {merge_first} to use data."
        )
    if recipe.fit_sets:
        assert recipe.fitting is not None
        raise RecipeError(
            f"{called}, but {recipe.fitting.called} on inputs has transformers load each finetune from its files. "
            f"{merge_first}, or leave the inputs away."
        )
    if recipe.evaluate is not None and (recipe.evaluate.parents or recipe.evaluate.average):
        raise RecipeError(
            f"{called}, and only whole models can be evaluated beside the merge. Drop parents and average from "
            f"evaluate. {merge_first} to compare with it."
        )
    if recipe.files_from in adapters:
        raise RecipeError(
            f"{recipe.files_from} is an adapter, not a whole model, but files_from takes config "
            "and tokenizer from there. Drop files_from to take the base's."
        )


def adapter_warnings(
    recipe: Recipe, base: Checkpoint, finetuned: Mapping[str, Checkpoint], chosen: Collection[str]
) -> Iterator[str]:
    """What may be wrong with adapters, or surprising, beside what holds for every finetune.

    chosen: the tensors that the method ranges over.
    """
    for name, checkpoint in finetuned.items():
        if isinstance(checkpoint, AdapterCheckpoint):
            yield from _adapter_warnings(base, name, checkpoint)
            if not (recipe.include or recipe.exclude or recipe.embeddings):
                yield from _unmerged(name, checkpoint, chosen)
        elif ADAPTER_CONFIG in checkpoint.source.files:
            yield (
                f"{name} holds an adapter beside whole weights: the whole weights are merged, the adapter is not. To "
                "merge the adapter, give a folder with its two files alone."
            )


def _adapter_warnings(base: Checkpoint, name: str, adapter: AdapterCheckpoint) -> Iterator[str]:
    named, repo = adapter.base_name, base.source.repo
    if named is not None and _is_another(named, base):
        yield (
            f"{name} was trained on {named}, as its {ADAPTER_CONFIG} says; the base given is {repo or base.label}. "
            "Over another base its changes mean nothing."
        )
    revision, commit = adapter.base_revision, base.source.commit
    if named == repo and revision is not None and commit is not None and not commit.startswith(revision):
        yield f"{name} was trained on {named}@{revision}, as its {ADAPTER_CONFIG} says; the base given is at {commit}."
    if adapter.left:
        yield f"{name} holds what the base has no place for: {some(adapter.left)}. It is left out."


def _unmerged(name: str, adapter: AdapterCheckpoint, chosen: Collection[str]) -> Iterator[str]:
    """A warning of what an adapter was trained for, and nobody asked to leave out."""
    stays, of_tokens = [t for layer in adapter.layers for t in layer if t not in chosen], token_matrices(adapter)
    if not stays:
        return
    which, it = ("stays", "it") if len(stays) == 1 else ("stay", "them")
    way = "--embeddings localize" if all(tensor in of_tokens for tensor in stays) else "--include '*'"
    yield f"{name} also changes {some(stays)}, which {which} the base's: {way} merges {it}, too."


def _is_another(named: str, base: Checkpoint) -> bool:
    """Whether the base that an adapter names can be told to be another than the one given.

    What is not here to be compared, such as where it was trained on another machine, is told apart by its last part.
    """
    repo = base.source.repo
    if repo is not None and could_be_repo(named):
        return named.casefold() != repo.casefold()
    given = Path(repo or base.source.label).absolute()
    if repo is None and os.path.isdir(named):
        return not os.path.samefile(named, given)
    cached = f"models--{named.replace('/', '--')}"  # a folder of the Hub's cache, whose last part is a commit
    return given.name.casefold() != Path(named).name.casefold() and cached not in given.parts

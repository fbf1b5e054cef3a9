"""What each input's tokenizer and matrices say, before the tokens of the output are chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_locstitch.checkpoints.aligned import RowSources
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.config import part
from hf_locstitch.checkpoints.vocabulary import (
    Vocabulary,
    has_tokenizer,
    read_vocabulary,
    same_vocabulary,
    token_matrices,
)
from hf_locstitch.errors import CheckpointError, MismatchError, RecipeError
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.runtime.human import more, some


@dataclass(frozen=True)
class TokenModel:
    """rows: of its matrices. vocabulary: None if it is the base's, or not known. by_number: whether its rows are those
    of the base's tokens by number: it has the base's tokenizer, or none."""

    label: str
    rows: int
    vocabulary: Vocabulary | None = field(repr=False)
    by_number: bool

    @property
    def entries(self) -> Mapping[str, Mapping[str, Any]]:
        return self.vocabulary.added if self.vocabulary else {}

    def at(self, token: str) -> str:
        """A token and its id, for messages."""
        return f"{token!r} at the id {self.vocabulary.ids[token] if self.vocabulary else None}"

    def new_tokens(self, base: TokenModel) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Those that were added to it, that it has rows for and that the base lacks, by id, with their entries."""
        if self.vocabulary is not None and base.vocabulary is not None:
            ids, known = self.vocabulary.ids, base.vocabulary.ids
            for token in sorted(self.vocabulary.added, key=ids.__getitem__):
                if token not in known and ids[token] < self.rows:
                    yield token, self.vocabulary.added[token]

    def lost_tokens(self, base: TokenModel) -> tuple[list[str], list[str]]:
        """Tokens that the base lacks and that cannot be added to it: of the tokenizer's own model; without a row."""
        if self.vocabulary is None or base.vocabulary is None:
            return [], []
        new = [token for token in self.vocabulary.ids if token not in base.vocabulary.ids]
        own = [token for token in new if token not in self.vocabulary.added]
        return own, [token for token in new if self.vocabulary.ids[token] >= self.rows and token not in own]


@dataclass(frozen=True)
class TokenModels:
    """matrices: of the base. localized: whether the method ranges over some of them. settled: whether the base's rows
    are all that is wanted, in any case."""

    matrices: tuple[str, ...]
    base: TokenModel
    finetuned: Mapping[str, TokenModel]
    localized: bool
    settled: bool
    warnings: tuple[str, ...]


def read_models(
    recipe: Recipe, base: Checkpoint, finetuned: Mapping[str, Checkpoint], chosen: Sequence[str]
) -> TokenModels | None:
    """None where there are no matrices, or all inputs have the same rows. Raises RecipeError, CheckpointError."""
    matrices = token_matrices(base)
    if not matrices:
        if asked := [one for one in ("tokenizer", "embeddings") if getattr(recipe, one) not in (None, "base")]:
            raise RecipeError(
                f"{asked[0]} is given, but no tensor of {base.label} is known as an embedding with as many rows as "
                f"the vocab_size of its config. Drop {asked[0]}."
            )
        return None
    rows = {name: _rows(matrices, one) for name, one in finetuned.items()}
    own = _rows(matrices, base) or 0
    unlike = [name for name, one in finetuned.items() if _has_other_tokens(base, one)]
    resized = [name for name, count in rows.items() if count not in (None, own)]
    localized = any(name in matrices for name in chosen)
    plain = recipe.embeddings in (None, "base", "localize")
    named = recipe.tokenizer if recipe.tokenizer in finetuned else None
    if plain and not unlike and (not resized or not (localized or named)):
        return None
    settled = recipe.tokenizer == "base" and plain and not localized
    read = _read_if_possible if settled else _read
    known = read(base) if unlike or named else None
    models = {
        name: TokenModel(one.label, rows[name] or 0, read(one) if name in unlike else None, name not in unlike)
        for name, one in finetuned.items()
    }
    start = TokenModel(base.label, own, known, True)
    if unlike and known is None:
        _refuse_unknown(recipe, base, localized and bool(resized))
    if named and models[named].by_number:
        models[named] = TokenModel(models[named].label, models[named].rows, known, True)
    settled |= bool(unlike) and known is None
    losses = list(_losses(recipe, start, models, localized, settled))
    return TokenModels(matrices, start, models, localized, settled, tuple(losses))


def _has_other_tokens(base: Checkpoint, other: Checkpoint) -> bool:
    return has_tokenizer(other.source) and not same_vocabulary(base.source, other.source)


def _read(checkpoint: Checkpoint) -> Vocabulary | None:
    return read_vocabulary(checkpoint.source)


def _read_if_possible(checkpoint: Checkpoint) -> Vocabulary | None:
    try:
        return read_vocabulary(checkpoint.source)
    except CheckpointError:
        return None


def _rows(matrices: Sequence[str], checkpoint: Checkpoint) -> int | None:
    """How many rows the matrices have; None if it has none of them. Raises CheckpointError if they differ."""
    counts = {checkpoint.info(name).shape[0]: name for name in matrices if name in checkpoint.tensors}
    if len(counts) > 1:
        listed = ", ".join(f"{name} has {count:,} rows" for count, name in counts.items())
        raise MismatchError([f"{listed} in {checkpoint.label}, where each token needs one in all of them"])
    return next(iter(counts), None)


def _refuse_unknown(recipe: Recipe, base: Checkpoint, needed: bool) -> None:
    if needed or recipe.tokenizer not in (None, "base") or recipe.embeddings not in (None, "base", "localize"):
        raise CheckpointError(
            f"the tokens of {base.label} are not known: it has neither tokenizer.json nor vocab.json, so rows cannot "
            "be matched by them. Save its tokenizer again with transformers, or leave the embeddings as they are in the "
            "base: --tokenizer base --embeddings base."
        )


def _losses(
    recipe: Recipe, base: TokenModel, models: Mapping[str, TokenModel], localized: bool, settled: bool
) -> Iterator[str]:
    """What of the finetunes' tokens the output will lack. Raises MismatchError if all of them were asked for."""
    problems: list[str] = []
    for name, model in models.items():
        if model.vocabulary is None and not model.by_number:
            said = f"the tokens of {name} are not known: it has neither tokenizer.json nor vocab.json"
            if recipe.tokenizer in ("union", name) or recipe.embeddings not in (None, "base") or localized:
                problems.append(
                    f"{said}; save its tokenizer again with transformers, or use --tokenizer base --embeddings base"
                )
            yield f"{said}. If it added any, they are lost."
            continue
        own, rowless = model.lost_tokens(base)
        if rowless and recipe.tokenizer in ("union", name):
            problems.append(
                f"{name}'s tokenizer has {model.at(rowless[0])}{more(len(rowless))}, but"
                f" its embeddings have {model.rows:,} rows; resize them (resize_token_embeddings) and save it again"
            )
        elif rowless:
            yield f"{name}'s tokenizer has tokens without a row in its embeddings ({some(rowless)}): they are left out."
        if own and recipe.tokenizer == "union":
            problems.append(
                f"the tokenizer of {name} itself, not what was added to it, has {len(own):,} tokens that the base "
                f"lacks, such as {own[0]!r}: they cannot be added without its merge rules; use --tokenizer {name}, or drop it"
            )
        elif own and recipe.tokenizer != name:
            yield (
                f"{len(own):,} tokens of {name}'s tokenizer itself, such as {own[0]!r}, are lost: the base's has no "
                f"rules for them. --tokenizer {name} keeps them."
            )
        if recipe.tokenizer == "base" and (new := [token for token, _ in model.new_tokens(base)]):
            yield f"{len(new):,} tokens that {name} added ({some(new)}) are dropped; --tokenizer union keeps them."
    if problems:
        raise MismatchError(problems)


def matrix_names(
    matrices: Sequence[str], models: Mapping[str, Checkpoint], sources: Mapping[str, RowSources]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The name of each matrix in each model, and why a model has none that it needs."""
    used = {name for by in sources.values() for name, rows in by.items() if (rows >= 0).any()} | set(sources)
    found: dict[str, dict[str, str]] = {matrix: {} for matrix in matrices}
    problems: list[str] = []
    for matrix in matrices:
        for name, checkpoint in models.items():
            own = _own_name(matrix, matrices, models["base"], checkpoint)
            if own is not None:
                found[matrix][name] = own
            elif name in used:
                problems.append(
                    f"{name} has no {matrix} of the base's width and floating-point, whose rows are needed for its "
                    "tokens; use --tokenizer base --embeddings base, or save it with the base's class"
                )
    return found, problems


def _own_name(matrix: str, matrices: Sequence[str], base: Checkpoint, other: Checkpoint) -> str | None:
    """A head that is not stored is the embedding, if the config ties the two."""
    width = base.info(matrix).shape[1:]
    tied = any(one.get("tie_word_embeddings", True) for one in (other.config, part(other.config, "text_config")))
    for name in (matrix, *(matrices if tied and len(width) == 1 and matrix not in other.tensors else ())):
        if name in other.tensors and other.info(name).shape[1:] == width and other.info(name).floating:
            return name
    return None

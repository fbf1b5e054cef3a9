"""What each input's tokenizer and matrices say, before the tokens of the output are chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_locstitch.checkpoints.adapter import AdapterCheckpoint
from hf_locstitch.checkpoints.aligned import RowSources
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.vocabulary import (
    WAY_OUT,
    Vocabulary,
    has_tokenizer,
    read_vocabulary,
    row_count,
    row_shape,
    same_vocabulary,
    token_matrices,
)
from hf_locstitch.errors import CheckpointError, MismatchError, RecipeError
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.runtime.human import counted, more, some
from hf_locstitch.tasks.token_shapes import ties_head

BASE, UNION, MEAN, LOCALIZE = "base", "union", "mean", "localize"
WORDS = (BASE, UNION, MEAN, LOCALIZE)  # that stand where a finetune's name may, too


@dataclass(frozen=True)
class TokenModel:
    """rows: of its matrices. vocabulary: None if it is the base's, or not known. by_number: whether its rows are those
    of the base's tokens by number: it has the base's tokenizer, or none."""

    label: str
    rows: int
    vocabulary: Vocabulary | None = field(repr=False)
    by_number: bool
    unknown: str = ""
    """Why the tokens are not known, if they are not."""
    is_adapter: bool = False

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
class Said:
    """What a person should know of the tokens; notes: what was asked for."""

    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenModels:
    """matrices: of the base. localized: whether the method ranges over some of them. settled: whether the base's rows
    are all that is wanted, in any case."""

    matrices: tuple[str, ...]
    base: TokenModel
    finetuned: Mapping[str, TokenModel]
    localized: bool
    settled: bool
    said: Said


def read_models(
    recipe: Recipe, base: Checkpoint, finetuned: Mapping[str, Checkpoint], chosen: Sequence[str]
) -> TokenModels | None:
    """None where there are no matrices, those of several vocabularies, or all inputs have the same rows.

    Raises RequestError.
    """
    matrices = token_matrices(base)
    if len({row_count(base.info(name).shape) for name in matrices}) != 1:
        _refuse_without_vocabulary(recipe, base, matrices)
        return None
    rows = {name: _rows(matrices, one) for name, one in finetuned.items()}
    own = _rows(matrices, base) or 0
    unlike = [name for name, one in finetuned.items() if _has_other_tokens(base, one)]
    resized = any(count not in (None, own) for count in rows.values())
    localized = any(name in matrices for name in chosen)
    asked = recipe.tokenizer not in (None, BASE) or recipe.embeddings not in (None, BASE, LOCALIZE)
    if not unlike and not (asked or (resized and localized)):
        return None
    settled = not asked and recipe.tokenizer == BASE and not localized
    needed = asked or localized or (resized and not settled)
    known = _read_model(base, own, needed) if unlike or recipe.tokenizer in finetuned else None
    start = known or TokenModel(base.label, own, None, True)
    models = {
        name: _read_model(one, rows[name] or 0, needed)
        if name in unlike
        else TokenModel(one.label, rows[name] or 0, start.vocabulary if name == recipe.tokenizer else None, True)
        for name, one in finetuned.items()
    }
    if unlike and start.vocabulary is None:
        if asked or (localized and resized):
            raise CheckpointError(f"{start.unknown}, so rows cannot be matched by them. {WAY_OUT}")
        settled = True
    losses = Losses(recipe, start, models, asked or localized)
    losses.check()
    return TokenModels(matrices, replace(start, by_number=True), models, localized, settled, losses.said)


def _refuse_without_vocabulary(recipe: Recipe, base: Checkpoint, matrices: Sequence[str]) -> None:
    """Raises RecipeError if a choice is made between tokens of a base that has no matrices, or several vocabularies."""
    if asked := [one for one in ("tokenizer", "embeddings") if getattr(recipe, one) not in (None, BASE)]:
        known = (
            f"{some(matrices)} of {base.label} are of several vocabularies, and which is its tokenizer's is unknown"
            if matrices
            else f"no tensor of {base.label} is known as an embedding with as many rows as the vocab_size of its config"
        )
        raise RecipeError(f"{asked[0]} is given, but {known}. Drop {asked[0]}.")


def _has_other_tokens(base: Checkpoint, other: Checkpoint) -> bool:
    return has_tokenizer(other.source) and not same_vocabulary(base.source, other.source)


def _read_model(checkpoint: Checkpoint, rows: int, needed: bool) -> TokenModel:
    """needed: whether a tokenizer that is malformed is an error. Raises CheckpointError."""
    reason = "it has neither tokenizer.json nor vocab.json"
    vocabulary = None
    try:
        vocabulary = read_vocabulary(checkpoint.source)
    except CheckpointError as error:
        if needed:
            raise
        reason = str(error)
    unknown = f"the tokens of {checkpoint.label} are not known: {reason}"
    return TokenModel(checkpoint.label, rows, vocabulary, False, unknown, isinstance(checkpoint, AdapterCheckpoint))


def _rows(matrices: Sequence[str], checkpoint: Checkpoint) -> int | None:
    """How many rows the matrices have; None if it has none of them. Raises MismatchError if they differ."""
    counts = {row_count(checkpoint.info(name).shape): name for name in matrices if name in checkpoint.tensors}
    if len(counts) > 1:
        listed = ", ".join(f"{name} has {count:,} rows" for count, name in counts.items())
        raise MismatchError([f"{listed} in {checkpoint.label}, where each token needs one in all of them"])
    return next(iter(counts), None)


class Losses:
    """What of the finetunes' tokens the output will lack. needed: whether all of their rows are to be known."""

    def __init__(self, recipe: Recipe, base: TokenModel, models: Mapping[str, TokenModel], needed: bool) -> None:
        self._tokenizer, self._base, self._models, self._needed = recipe.tokenizer, base, models, needed
        self._warnings: list[str] = []
        self._notes: list[str] = []
        self._problems: list[str] = []

    @property
    def said(self) -> Said:
        return Said(tuple(self._warnings), tuple(self._notes))

    def check(self) -> None:
        """Raises MismatchError for what was asked for and cannot be kept; everything else is said."""
        for name, model in self._models.items():
            if model.vocabulary is None and not model.by_number:
                self._unknown(model)
                continue
            if self._tokenizer != BASE:
                own, rowless = model.lost_tokens(self._base)
                self._without_rows(name, model, rowless)
                self._without_rules(name, own)
        if self._problems:
            raise MismatchError(self._problems)

    def _unknown(self, model: TokenModel) -> None:
        if self._needed:
            self._problems.append(f"{model.unknown}. {WAY_OUT}")
        said = f"{model.unknown.rstrip('.')}. If any were added, they are lost."
        (self._notes if self._tokenizer == BASE else self._warnings).append(said)

    def _without_rows(self, name: str, model: TokenModel, tokens: Sequence[str]) -> None:
        if not tokens:
            return
        which = f"{model.at(tokens[0])}{more(len(tokens))}"
        said = f"{name}'s tokenizer has {which}, but its embeddings have {model.rows:,} rows"
        cure = "resize them (resize_token_embeddings) and save it again"
        if model.is_adapter:
            said += ", those of the base: rows that an adapter adds are not taken"
            cure = "merge the adapter first (merge_and_unload), and name that folder"
        if self._tokenizer in (UNION, name):
            self._problems.append(f"{said}; {cure}")
        else:
            self._warnings.append(f"{said}. What has no row is left out; to have it, {cure}.")

    def _without_rules(self, name: str, tokens: Sequence[str]) -> None:
        """Tokens of a tokenizer's own model, which it makes of text by rules that the base's has not."""
        if not tokens or self._tokenizer not in (None, UNION):
            return
        said = f"{counted(len(tokens), 'token')} of {name}'s tokenizer itself, such as {tokens[0]!r}"
        if self._tokenizer == UNION:
            self._problems.append(
                f"{said}, cannot be added to the base's, which has no rules for them; use --tokenizer {name}"
            )
        else:
            self._warnings.append(f"{said}, are lost: the base's has no rules for them. --tokenizer {name} keeps them.")


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
    row = row_shape(base.info(matrix).shape)
    tied = len(row) == 1 and matrix not in other.tensors and ties_head(other.config)
    for name in (matrix, *(matrices if tied else ())):
        if name in other.tensors and row_shape(other.info(name).shape) == row and other.info(name).floating:
            return name
    return None

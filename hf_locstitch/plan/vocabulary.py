"""Which tokens the output has, and where each row of its embeddings and heads comes from.

Tokens are told apart by their strings, never by their ids. The plan of the rows is data made from tokenizers and
headers: see checkpoints/aligned.py for how they are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np

from hf_locstitch.checkpoints.aligned import Alignment, Rows, RowSources
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.vocabulary import resized, row_count
from hf_locstitch.errors import MismatchError, RecipeError
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.plan.token_models import BASE, LOCALIZE, MEAN, UNION, Said, TokenModel, matrix_names, read_models
from hf_locstitch.runtime.human import more, some
from hf_locstitch.tasks.token_shapes import shapes_in_memory

TOKENIZERS = (BASE, UNION)
EMBEDDINGS = (BASE, MEAN, LOCALIZE)
MULTIPLES = (128, 64, 32, 8)


@dataclass(frozen=True)
class AddedToken:
    """A token that the base lacks. sources: the finetunes that have it. entry: of the first one's tokenizer."""

    token: str
    id: int
    sources: tuple[str, ...]
    entry: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class VocabularyPlan:
    """tokenizer: "base", "union" or a finetune's name. embeddings: what rows of the base's tokens are.

    localized: whether the method ranges over them; then it sees all inputs in the output's rows, else it does not see
    these tensors. tokens: of the output; base_tokens: those of them that the base has. multiple: the rows are padded
    to. ids: of the output's tokens by their strings; None: those of the base.
    """

    tokenizer: str
    embeddings: str
    localized: bool
    alignment: Alignment
    tokens: int
    base_tokens: int
    multiple: int
    added: tuple[AddedToken, ...]
    ids: Mapping[str, int] | None = field(repr=False)
    notes: tuple[str, ...] = ()
    """What is worth knowing of how rows were matched."""

    @property
    def matrices(self) -> tuple[str, ...]:
        return tuple(self.alignment.matrices)

    @property
    def sources(self) -> dict[tuple[str, ...], int]:
        """How many of the added tokens come from which finetunes."""
        return dict(Counter(token.sources for token in self.added))

    def describe(self) -> str:
        """One line for people."""
        parts = [f"{self.base_tokens:,} tokens of the base"]
        parts += [f"{count:,} added by {_by(names)}" for names, count in self.sources.items()]
        padded = f" (padded to a multiple of {self.multiple})" if self.multiple > 1 else ""
        rows = f"{self.alignment.rows:,} rows{padded if self.alignment.rows > self.tokens else ''}"
        old = {BASE: "the base's", MEAN: "the finetunes' mean", LOCALIZE: "merged as other tensors are"}
        kept = old.get(self.embeddings, f"{self.embeddings}'s")
        return f"{', '.join(parts)} → {rows} of {some(self.matrices)}; rows of the base's tokens are {kept}"

    def as_json(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer,
            "embeddings": self.embeddings,
            "tensors": list(self.matrices),
            "tokens": self.tokens,
            "of_base": self.base_tokens,
            "rows": self.alignment.rows,
            "multiple": self.multiple,
            "added": [{"token": one.token, "id": one.id, "from": list(one.sources)} for one in self.added],
        }


def _by(names: Sequence[str]) -> str:
    return f"{' and '.join(names)}" + (f" (the mean of {len(names)})" if len(names) > 1 else "")


def check_choices(recipe: Recipe, names: Sequence[str]) -> Iterator[str]:
    """A sentence for each setting that is neither one of its words nor a finetune's name."""
    for asked, words in (("tokenizer", TOKENIZERS), ("embeddings", EMBEDDINGS)):
        value = getattr(recipe, asked)
        if value is not None and value not in (*words, *names):
            near = get_close_matches(value, [*words, *names], n=1, cutoff=0.0)[0]
            yield (
                f"{asked} is {value!r}, which is neither {' nor '.join(words)} nor one of the finetunes "
                f"({', '.join(names)}); did you mean {near!r}?"
            )


def plan_vocabulary(
    recipe: Recipe,
    base: Checkpoint,
    finetuned: Mapping[str, Checkpoint],
    chosen: Sequence[str],
    order: Sequence[str],
) -> tuple[VocabularyPlan | None, Said]:
    """The plan, or None where every row keeps its place and the base's values, and what to say of lost tokens.

    chosen: the tensors that the method ranges over. order: in which finetunes are summed. Raises RecipeError,
    MismatchError, CheckpointError.
    """
    if problems := list(check_choices(recipe, list(finetuned))):
        raise MismatchError(problems)
    if recipe.rest_from or recipe.files_from:
        return None, Said()
    models = read_models(recipe, base, finetuned, chosen)
    if models is None:
        return None, Said()
    if models.settled:
        return None, models.said
    tokenizer = recipe.tokenizer or UNION
    made = _Maker(models.base, {name: models.finetuned[name] for name in order}, tokenizer, recipe.embeddings or BASE)
    localized = models.localized
    stays = made.unchanged and (not localized or made.in_place)
    if stays and recipe.embeddings in (None, BASE, LOCALIZE):
        return None, models.said
    sources = made.sources(localized)
    matrices, problems = matrix_names(models.matrices, {BASE: base, **finetuned}, sources)
    if problems:
        raise MismatchError(problems)
    rows_by = LOCALIZE if localized else recipe.embeddings or BASE
    alignment = Alignment(made.rows, {BASE: base, **finetuned}, matrices, sources)
    if problems := list(_unloadable(alignment)):
        raise MismatchError(problems)
    notes = tuple(made.reordered())
    plan = VocabularyPlan(
        tokenizer, rows_by, localized, alignment, made.tokens, made.base_tokens, made.multiple, made.added, made.ids,
        notes,
    )  # fmt: skip
    return plan, models.said


def _unloadable(alignment: Alignment) -> Iterator[str]:
    """Why transformers would not load the base with its matrices in these rows: what else has as many as there are
    tokens."""
    base, layout, matrices = alignment.own[BASE], alignment.layout(), alignment.matrices
    counts = {row_count(base.info(name).shape) for name in matrices}
    if counts == {alignment.rows}:
        return
    before = shapes_in_memory(base.config, base.tensors)
    after = shapes_in_memory(resized(base.config, counts, alignment.rows), base.tensors)
    if before is None or after is None:
        return
    known = [name for name, shape in before.items() if shape == base.info(name).shape and name in after]
    if wrong := [name for name in known if after[name] != layout.info(name).shape]:
        name = wrong[0]
        yield (
            f"{name} is {list(layout.info(name).shape)}, where transformers expects {list(after[name])} with "
            f"{alignment.rows:,} rows of {some(tuple(matrices))}{more(len(wrong))}: it follows the vocabulary in a way "
            "that is not known, so that tokens cannot be added; leave new ones out with --tokenizer base --embeddings "
            "base"
        )


class _Maker:
    """finetuned: in the order of summation, which decides the order of new tokens, too."""

    def __init__(self, base: TokenModel, finetuned: Mapping[str, TokenModel], tokenizer: str, embeddings: str) -> None:
        self._base, self._finetuned, self._embeddings = base, finetuned, embeddings
        self._owner = finetuned.get(tokenizer, base)
        new = self._new() if tokenizer == UNION else []
        self.ids = self._output_ids([token for token, _ in new])
        last = max((self.ids or {}).values(), default=-1) + 1
        self.multiple = _multiple(base)
        self.rows = max(self._owner.rows, -(-last // self.multiple) * self.multiple if new else 0)
        self.index = {BASE: self._index(base), **{name: self._index(model) for name, model in finetuned.items()}}
        self._is_token = np.ones(self.rows, bool)
        if self.ids is not None:
            self._is_token[:] = False
            self._is_token[list(self.ids.values())] = True
        self.tokens = int(self._is_token.sum())
        self.base_tokens = int((self.index[BASE] >= 0).sum())
        entries = dict(new) if tokenizer == UNION else self._owner.entries
        self.added = tuple(self._added(entries)) if self.ids is not None else ()

    def _new(self) -> list[tuple[str, Mapping[str, Any]]]:
        """What finetunes added and the base lacks, each with its entry: by finetune, then by id."""
        found: dict[str, Mapping[str, Any]] = {}
        for model in self._finetuned.values():
            found |= {token: entry for token, entry in model.new_tokens(self._base) if token not in found}
        return list(found.items())

    def _output_ids(self, new: Sequence[str]) -> Mapping[str, int] | None:
        known = self._owner.vocabulary
        if known is None:
            return None
        rowless = [token for token, number in known.ids.items() if number >= self._owner.rows]
        if rowless and new:
            raise MismatchError(
                [
                    f"the tokenizer of {self._owner.label} has {rowless[0]!r} at the id {known.ids[rowless[0]]}"
                    f"{more(len(rowless))}, but its embeddings have {self._owner.rows:,} rows: tokens cannot be added "
                    "after it. Leave new tokens out with --tokenizer base, or use a finetune's: --tokenizer NAME"
                ]
            )
        taken, first = set(known.ids.values()), known.next_id
        if clash := [token for number, token in enumerate(new, first) if number in taken]:
            raise RecipeError(
                f"the ids of {self._owner.label}'s tokenizer have gaps, so that {clash[0]!r} cannot be added to it. "
                "Use the tokenizer of a finetune, --tokenizer NAME, or leave new tokens out with --tokenizer base."
            )
        own = known.ids if not rowless else {token: i for token, i in known.ids.items() if i < self._owner.rows}
        return {**own, **{token: number for number, token in enumerate(new, first)}}

    def _index(self, model: TokenModel) -> Rows:
        """Which row of the model holds the token of each of the output's rows; -1: none does."""
        index = np.full(self.rows, -1, np.int64)
        if self.ids is None:
            shared = min(self.rows, model.rows) if model.by_number else 0
            index[:shared] = np.arange(shared)
            return index
        vocabulary = model.vocabulary or (self._base.vocabulary if model.by_number else None)
        if vocabulary is not None:
            for token, number in self.ids.items():
                if (row := vocabulary.ids.get(token, -1)) < model.rows:
                    index[number] = row
        return index

    def _added(self, entries: Mapping[str, Mapping[str, Any]]) -> Iterator[AddedToken]:
        assert self.ids is not None
        base = self.index[BASE]
        for token, number in self.ids.items():
            if base[number] < 0:
                sources = tuple(name for name in self._finetuned if self.index[name][number] >= 0)
                yield AddedToken(token, number, sources, entries.get(token, {}))

    @property
    def unchanged(self) -> bool:
        """Whether every row of the base stands where it stood, and there is none beside."""
        index = self.index[BASE]
        same = (index == np.arange(self.rows)) | ~self._is_token
        return self.rows == self._base.rows and self._owner is self._base and bool(same.all())

    @property
    def in_place(self) -> bool:
        """Whether the finetunes have their rows in these places, too."""
        here = np.arange(self.rows)
        return all(
            model.rows == self.rows and bool(((self.index[name] == here) | ~self._is_token).all())
            for name, model in self._finetuned.items()
        )

    def reordered(self) -> Iterator[str]:
        """A sentence for each finetune that has tokens of the base under other ids."""
        ours = self._base.vocabulary.ids if self._base.vocabulary else {}
        for name, model in self._finetuned.items():
            theirs = model.vocabulary.ids if model.vocabulary else {}
            if moved := [token for token, number in ours.items() if theirs.get(token, number) != number]:
                yield (
                    f"{name} has {len(moved):,} of the base's tokens under other ids, such as {moved[0]!r} "
                    f"({theirs[moved[0]]}, in the base {ours[moved[0]]}): rows are matched by the tokens' strings."
                )

    def sources(self, localized: bool) -> dict[str, RowSources]:
        """Where the rows of each model come from, as the method sees it; those of the base are the output's."""
        base = self._base_sources()
        if not localized:
            return {BASE: base}
        return {BASE: base, **{name: self._own_sources(base, name) for name in self._finetuned}}

    def _base_sources(self) -> dict[str, Rows]:
        taken = {name: np.full(self.rows, -1, np.int64) for name in (BASE, *self._finetuned)}
        old, new = self.index[BASE] >= 0, self._is_token & (self.index[BASE] < 0)
        asked = self._embeddings
        preferred = [asked] if asked in self._finetuned else []
        for name in self._finetuned:
            has = self.index[name] >= 0
            wins = has if name in preferred else ~self._any_has(preferred) & has
            here = (new & wins) | (old & has & (asked == MEAN or name in preferred))
            taken[name][here] = self.index[name][here]
        replaced = self._any_has(list(self._finetuned) if asked == MEAN else preferred)
        here = old & ~replaced
        taken[BASE][here] = self.index[BASE][here]
        owner = next((name for name, one in self._finetuned.items() if one is self._owner), BASE)
        rest = np.flatnonzero(~self._is_token)
        taken[owner][rest] = np.minimum(rest, self._owner.rows - 1)
        return taken

    def _any_has(self, names: Sequence[str]) -> Any:
        return np.any([self.index[name] >= 0 for name in names], axis=0) if names else np.zeros(self.rows, bool)

    def _own_sources(self, base: RowSources, name: str) -> dict[str, Rows]:
        """A finetune's: its own rows of the base's tokens, and for all others the output's, so that it changes none."""
        own = (self.index[BASE] >= 0) & (self.index[name] >= 0) & self._is_token
        taken = {model: np.where(own, -1, rows) for model, rows in base.items()}
        taken[name] = np.where(own, self.index[name], taken[name])
        return taken


def _multiple(base: TokenModel) -> int:
    """That the base's rows are padded to; 1 if it has no row beyond its tokens."""
    if base.vocabulary is None or base.rows <= max(base.vocabulary.ids.values(), default=-1) + 1:
        return 1
    return next((multiple for multiple in MULTIPLES if base.rows % multiple == 0), 1)

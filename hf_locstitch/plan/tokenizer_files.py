"""The tokenizer, chat template and special ids of the output: files of the chosen models, edited where tokens are
added.

What is edited stays as it is in all else; what is another model's is copied byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_locstitch.checkpoints.checkpoint import CONFIG, Checkpoint, read_json
from hf_locstitch.checkpoints.ref import expand_home
from hf_locstitch.checkpoints.side_files import TEMPLATES, TOKENIZER, SideFiles, choose_side_files, matching
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.checkpoints.vocabulary import (
    DECODER,
    FAST,
    SLOW_ADDED,
    TOKENIZER_CONFIG,
    WAY_OUT,
    read_vocabulary,
    resized,
    row_count,
)
from hf_locstitch.errors import CheckpointError, MismatchError, RecipeError
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.plan.vocabulary import BASE, AddedToken, VocabularyPlan
from hf_locstitch.runtime.parsing import JSON_BYTES

GENERATION = "generation_config.json"
SPECIAL_MAP = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
TEMPLATE_BYTES = 1_000_000
IN_CONFIG = "chat_template"  # of tokenizer_config.json
# Lists of special tokens beside those with a role, in tokenizer_config.json and special_tokens_map.json.
LISTS = ("additional_special_tokens", "extra_special_tokens")
TOKEN_ID = re.compile(r"_token_ids?$|_token_index$")
ADDED_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")

Texts = dict[str, bytes]


def with_tokens(
    recipe: Recipe,
    files: Checkpoint,
    chosen: SideFiles,
    finetuned: Mapping[str, Checkpoint],
    vocabulary: VocabularyPlan | None,
) -> tuple[SideFiles, list[str], list[str]]:
    """The side files with those of the chosen tokenizer and chat template, warnings, and what else is worth knowing.

    files: whose config and tokenizer the output has by default. Raises RequestError.
    """
    edit = _Edit(files, chosen, finetuned, vocabulary)
    if recipe.tokenizer in finetuned:
        edit.take_tokenizer(str(recipe.tokenizer))
    elif vocabulary is not None and vocabulary.added:
        edit.add_tokens(vocabulary.added)
    edit.choose_template(recipe)
    if vocabulary is not None:
        edit.resize(vocabulary)
    return edit.done(), edit.warnings, edit.notes


class _Edit:
    """files: those that `chosen` are of."""

    def __init__(
        self,
        files: Checkpoint,
        chosen: SideFiles,
        finetuned: Mapping[str, Checkpoint],
        vocabulary: VocabularyPlan | None,
    ) -> None:
        self._files, self._base, self._chosen, self._finetuned = files, files.source, chosen, finetuned
        self._vocabulary = vocabulary
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self._made: Texts = {}
        self._dropped: set[str] = set()

    def done(self) -> SideFiles:
        copied = tuple(f for f in self._chosen.copied if f not in self._made and f not in self._dropped)
        return replace(self._chosen, copied=copied, made=self._made)

    def _json(self, file: str) -> dict[str, Any] | None:
        """A file of the output as it stands; None if there is none."""
        if file in self._made:
            return json.loads(self._made[file])
        present = file in self._chosen.copied and file not in self._dropped
        return read_json(self._base, file) if present else None

    def _put(self, file: str, fields: Mapping[str, Any]) -> None:
        self._made[file] = (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()

    def _drop(self, globs: Sequence[str]) -> None:
        self._dropped |= {file for file in self._chosen.copied if matching(file, globs)}
        self._made = {file: text for file, text in self._made.items() if not matching(file, globs)}

    def take_tokenizer(self, name: str) -> None:
        """All files of a finetune's tokenizer in place of the base's, and its special ids."""
        theirs = self._finetuned[name]
        files = [file for file in choose_side_files(theirs).copied if matching(file, TOKENIZER)]
        if not files:
            raise MismatchError([f"{theirs.label} has no tokenizer; drop tokenizer: {name}"])
        self._drop(TOKENIZER)
        self._made |= {file: _read(theirs.source, file) for file in files}
        for file in (CONFIG, GENERATION):
            fields = self._json(file)
            if fields is not None and file in theirs.source.files:
                changed = _with_special_ids(fields, read_json(theirs.source, file))
                if changed != fields:
                    self._put(file, changed)

    def add_tokens(self, added: Sequence[AddedToken]) -> None:
        """Append tokens to the base's tokenizer."""
        settings = self._json(TOKENIZER_CONFIG)
        tokenizer = self._json(FAST)
        if tokenizer is not None:
            entries = [{**one.entry, "id": one.id} for one in added]
            listed = [*(tokenizer.get("added_tokens") or []), *entries]
            self._put(FAST, {**tokenizer, "added_tokens": sorted(listed, key=lambda entry: entry["id"])})
        ids = self._json(SLOW_ADDED)
        if ids is not None or tokenizer is None:
            self._put(SLOW_ADDED, {**(ids or {}), **{one.token: one.id for one in added}})
        if settings is not None and (tokenizer is None or DECODER in settings):
            decoder = {str(one.id): _decoder_entry(one) for one in added}
            known = settings.get(DECODER) or {}
            if not isinstance(known, dict):
                raise self._malformed(TOKENIZER_CONFIG, DECODER, "an object", known)
            settings[DECODER] = {**known, **decoder}
            self._put(TOKENIZER_CONFIG, settings)
        self._list_special(added)

    def _list_special(self, added: Sequence[AddedToken]) -> None:
        """Name those among the special tokens that a finetune names there."""
        for file in (TOKENIZER_CONFIG, SPECIAL_MAP):
            fields = self._json(file)
            if fields is None:
                continue
            own = next((key for key in LISTS if isinstance(fields.get(key), list)), None)
            found: dict[str, str] = {}
            for checkpoint in self._finetuned.values():
                found |= dict(_listed_special(checkpoint.source, file))
            for token in (one.token for one in added if one.token in found):
                key = own or next(key for key in (found[token], *LISTS) if not isinstance(fields.get(key), dict))
                known = fields.get(key) or []
                if not isinstance(known, list):
                    raise self._malformed(file, key, "a list", known)
                fields[key] = [*known, token]
                self._put(file, fields)

    def _malformed(self, file: str, key: str, due: str, got: object) -> CheckpointError:
        return CheckpointError(
            f"{key} in {self._base.label}/{file} must be {due}, but is {json.dumps(got)[:60]}: no tokens can be added "
            f"to it. {WAY_OUT}"
        )

    def choose_template(self, recipe: Recipe) -> None:
        """Put the files of the chosen template in the place of the others."""
        owner = template_owner(recipe, self._files, self._finetuned, self._vocabulary)
        tokenizer = recipe.tokenizer if recipe.tokenizer in self._finetuned else BASE
        if owner in self._finetuned:
            source = self._finetuned[owner].source
            if recipe.chat_template is not None and not has_template(source):
                raise MismatchError([f"{source.label} has no chat template; drop chat_template: {owner}"])
            self._take_template(template_files(source), _template_in_config(source))
            if recipe.chat_template is None and owner != tokenizer:
                self.warnings.append(
                    f"the chat template is that of {owner}, whose tokens are added; the base has none."
                )
            if owner != tokenizer:
                self._end_with(owner)
        elif owner != BASE:
            self._take_template({TEMPLATE: read_template(owner, list(self._finetuned))}, None)
        elif tokenizer != BASE:
            self._take_template(template_files(self._base), _template_in_config(self._base))

    def _take_template(self, files: Texts, in_config: Any) -> None:
        self._drop(TEMPLATES)
        self._made |= files
        settings = self._json(TOKENIZER_CONFIG)
        if settings is not None and settings.get(IN_CONFIG) != in_config:
            settings.pop(IN_CONFIG, None)
            self._put(TOKENIZER_CONFIG, settings if in_config is None else {**settings, IN_CONFIG: in_config})

    def _end_with(self, name: str) -> None:
        """Answers end with the tokens that end them in the finetune whose chat template is taken, too."""
        ours, theirs = self._json(GENERATION) or {}, self._finetuned[name]
        config = self._json(CONFIG) or {}
        ids = _ids(_end_ids(theirs))
        end = [number for one in ids if (number := self._output_id(theirs.source, one)) is not None]
        have = _ids(ours.get("eos_token_id", config.get("eos_token_id")))
        if missing := [number for number in end if number not in have]:
            kept = {key: value for key, value in config.items() if key in ("bos_token_id", "pad_token_id")}
            self._put(GENERATION, {**kept, **ours, "eos_token_id": [*have, *missing]})
            self.notes.append(
                f"answers end with the tokens {missing}, too, as those of {name} do, whose chat template is taken."
            )

    def _output_id(self, source: Source, number: int) -> int | None:
        """The id in the output of a model's token; None if it is not there."""
        if self._vocabulary is None or self._vocabulary.ids is None:
            return number
        known = read_vocabulary(source)
        if known is None:
            return number
        token = next((token for token, one in known.ids.items() if one == number), None)
        return None if token is None else self._vocabulary.ids.get(token)

    def resize(self, vocabulary: VocabularyPlan) -> None:
        """vocab_size wherever the config has that of the base's matrices."""
        config = self._json(CONFIG)
        base, rows = vocabulary.alignment.own[BASE], vocabulary.alignment.rows
        old = row_count(base.info(vocabulary.matrices[0]).shape)
        if config is not None and rows != old:
            self._put(CONFIG, resized(config, {old}, rows))


def _with_special_ids(fields: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """fields with the ids of tokens (eos_token_id and the like) that the other has, also in their parts."""
    changed = dict(fields)
    for key, value in theirs.items():
        if TOKEN_ID.search(key) and (key in fields or key in ("bos_token_id", "eos_token_id", "pad_token_id")):
            changed[key] = value
        elif isinstance(value, dict) and isinstance(fields.get(key), dict):
            changed[key] = _with_special_ids(fields[key], value)
    return changed


def _decoder_entry(token: AddedToken) -> dict[str, Any]:
    return {"content": token.token, **{key: bool(token.entry.get(key)) for key in ADDED_FIELDS[1:]}}


def _listed_special(source: Source, file: str) -> Iterator[tuple[str, str]]:
    """Each special token without a role that the file lists, and the list's name."""
    fields = read_json(source, file) if file in source.files else {}
    for key in LISTS:
        for token in fields[key] if isinstance(fields.get(key), list) else ():
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                yield content, key


def _end_ids(checkpoint: Checkpoint) -> Any:
    source = checkpoint.source
    generation = read_json(source, GENERATION) if GENERATION in source.files else {}
    return generation.get("eos_token_id", checkpoint.config.get("eos_token_id"))


def _ids(value: Any) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    return [number for number in listed if type(number) is int]


def template_owner(
    recipe: Recipe, files: Checkpoint, finetuned: Mapping[str, Checkpoint], vocabulary: VocabularyPlan | None
) -> str:
    """Whose chat template the output has: "base", a finetune's name, or a file.

    By default that of the tokenizer; if the base has none, that of the one finetune with one whose tokens are added.
    files: whose config and tokenizer the output has by default, called the base here.
    """
    if recipe.chat_template is not None:
        return recipe.chat_template
    if recipe.tokenizer in finetuned:
        return str(recipe.tokenizer)
    if vocabulary is None or not vocabulary.added or has_template(files.source):
        return BASE
    adding = {name for token in vocabulary.added for name in token.sources}
    found = [name for name in adding if has_template(finetuned[name].source)]
    return found[0] if len(found) == 1 else BASE


def has_template(source: Source) -> bool:
    return bool(template_files(source)) or _template_in_config(source) is not None


def template_files(source: Source) -> Texts:
    return {file: _read(source, file) for file in source.files if matching(file, TEMPLATES) and file.count("/") < 2}


def _template_in_config(source: Source) -> Any:
    return read_json(source, TOKENIZER_CONFIG).get(IN_CONFIG) if TOKENIZER_CONFIG in source.files else None


def _read(source: Source, file: str) -> bytes:
    if (size := source.files[file].size) > JSON_BYTES:
        raise MismatchError([f"{source.label}/{file} has {size:,} bytes, more than the {JSON_BYTES:,} that are read"])
    return source.fetch(file).read_bytes()


def read_template(asked: str, names: Sequence[str]) -> bytes:
    """A chat template from a file of the user's. Raises RecipeError."""
    path = expand_home(Path(asked))
    try:
        if path.stat().st_size > TEMPLATE_BYTES:
            raise RecipeError(
                f"{path} has {path.stat().st_size:,} bytes, but a chat template at most {TEMPLATE_BYTES:,}. Use "
                "another."
            )
        content = path.read_bytes()
        content.decode()
    except OSError as error:
        raise RecipeError(
            f"chat_template is {asked!r}, which is neither base nor one of the finetunes ({', '.join(names)}) nor a "
            f"file that can be read ({error.strerror}). Give --chat-template base, one of these names, or the path of "
            "a file."
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not text in UTF-8, so it is no chat template. Use another file.") from error
    return content

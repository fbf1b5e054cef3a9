"""The tokens of a checkpoint, read from its tokenizer's JSON, and the tensors that have a row for each of them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_locstitch.checkpoints.checkpoint import Checkpoint, read_json
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.localizable import BLOCKS
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.parsing import JSON_BYTES, parse_json

FAST = "tokenizer.json"
SLOW = "vocab.json"  # with the tokens added later in
SLOW_ADDED = "added_tokens.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
DECODER = "added_tokens_decoder"  # of it: entries by id
# Files that a token's id may depend on where there is no tokenizer.json.
OTHERS = (
    SLOW, SLOW_ADDED, "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model",
    "tekken.json", "merges.txt",
)  # fmt: skip
# tests/checkpoints/test_token_matrices.py has the architectures of transformers whose names these are.
MATRICES = re.compile(
    r"(^|[._])(embed\w*|wte|shared|\w*head|output|decoder|predictions|final_logits_bias|lm_loss|pred_layer|proj_out|"
    r"vocab_projector)([._]|$)|(^|transformer\.)w\.weight$"
)
NOT_OF_TOKENS = re.compile(r"(position|token_type|wpe)")
EMBEDDING = re.compile(r"\b(embed_tokens|word_embeddings|wte)\.weight$")  # of a text, by name alone
SIZE, TEXT = "vocab_size", "text_config"
SIZES = (SIZE, "decoder_vocab_size", "n_words", "n_token")  # names of the number of tokens in configs
WAY_OUT = "Save the tokenizer again with transformers, or leave new tokens out: --tokenizer base --embeddings base."


@dataclass(frozen=True)
class Vocabulary:
    """ids: of each token, by its string. added: the entries of those that were added to the tokenizer's own model.

    next_id: that the tokenizers library gives to the next token that is added.
    """

    ids: Mapping[str, int] = field(repr=False)
    added: Mapping[str, Mapping[str, Any]] = field(repr=False)
    next_id: int


def token_matrices(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the embeddings and heads (and their biases) that have a row for each token, told by name and shape:
    as many as the config states, or, where it leaves that to the class of its text's part, as the embedding has."""
    sizes = set(vocabulary_sizes(checkpoint.config))
    if _is_unstated(checkpoint.config):
        sizes = {row_count(info.shape) for _, info in checkpoint.tensors.values() if EMBEDDING.search(info.name)}
    return tuple(
        info.name
        for _, info in checkpoint.tensors.values()
        if info.floating
        and len(info.shape) in (1, 2)
        and row_count(info.shape) in sizes
        and MATRICES.search(info.name)
        and not NOT_OF_TOKENS.search(info.name)
        and not BLOCKS.search(info.name)
    )


Shape = tuple[int, ...]


def row_shape(shape: Shape) -> Shape:
    """Of what such a matrix has for each token; () for a bias, which is [tokens] or, as in BART, [1, tokens]."""
    return () if _is_flat(shape) else shape[1:]


def row_width(info: TensorInfo) -> int:
    """Elements that such a matrix has for each token."""
    return math.prod(row_shape(info.shape))


def row_count(shape: Shape) -> int:
    """For how many tokens such a matrix has a row."""
    return shape[-1] if _is_flat(shape) else shape[0]


def with_rows(shape: Shape, rows: int) -> Shape:
    """The shape of such a matrix with so many rows."""
    return (*shape[:-1], rows) if _is_flat(shape) else (rows, *shape[1:])


def _is_flat(shape: Shape) -> bool:
    return len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)


def vocabulary_sizes(config: Mapping[str, Any]) -> Iterator[int]:
    """Each vocab_size of a config: its own, and those of its parts, such as text_config."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from vocabulary_sizes(value)
        elif key in SIZES and type(value) is int:
            yield value


def resized(config: Mapping[str, Any], counts: Collection[int], rows: int) -> dict[str, Any]:
    """The config with `rows` wherever it has one of these counts as vocab_size, of its own or of a part; with it in the
    text's part, where that leaves it to its class."""
    if _is_unstated(config):
        return {**config, TEXT: {**config[TEXT], SIZE: rows}}
    return _resized(config, counts, rows)


def _is_unstated(config: Mapping[str, Any]) -> bool:
    """Whether the number of tokens is the default of a class: parts of a config are written without their defaults."""
    return isinstance(config.get(TEXT), dict) and next(vocabulary_sizes(config), None) is None


def _resized(config: Mapping[str, Any], counts: Collection[int], rows: int) -> dict[str, Any]:
    return {
        key: _resized(value, counts, rows)
        if isinstance(value, dict)
        else rows
        if key in SIZES and type(value) is int and value in counts
        else value
        for key, value in config.items()
    }


def has_tokenizer(source: Source) -> bool:
    return any(file in source.files for file in (FAST, *OTHERS))


def same_vocabulary(one: Source, other: Source) -> bool:
    """Whether the files that give tokens their ids are the same in both."""
    files = (FAST,) if FAST in one.files and FAST in other.files else (FAST, *OTHERS)
    return all(same_file(one, other, file) for file in files)


def same_file(one: Source, other: Source, file: str) -> bool:
    """Whether both have this file, byte for byte the same, or neither has it."""
    left, right = one.files.get(file), other.files.get(file)
    if left is None or right is None:
        return left is right
    if left.promised is not None and left.promised == right.promised:
        return True
    return left.size == right.size and one.fetch(file).read_bytes() == other.fetch(file).read_bytes()


def read_vocabulary(source: Source) -> Vocabulary | None:
    """The tokens of a source; None if it has no tokenizer in JSON. Raises CheckpointError if that is malformed."""
    file = FAST if FAST in source.files else SLOW
    if file not in source.files:
        return None
    try:
        return _read_fast(source) if file == FAST else _read_slow(source)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        fault = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{source.label}/{file} is not a tokenizer that can be read ({fault}). {WAY_OUT}"
        ) from error


def _read_fast(source: Source) -> Vocabulary:
    content = _parse(source, FAST)
    own = _ids_of_model(content["model"]["vocab"])
    entries = content.get("added_tokens") or []
    if not all(isinstance(entry, dict) and isinstance(entry["content"], str) for entry in entries):
        raise ValueError("added_tokens must be a list of tokens with id and content")
    added = {entry["content"]: entry for entry in entries}
    if len(added) < len(entries):
        raise ValueError("a token is added twice")
    return _vocabulary(own, added)


def _ids_of_model(vocab: Any) -> dict[str, int]:
    """vocab: token -> id, or for Unigram a list of [token, score]."""
    if isinstance(vocab, dict):
        return vocab
    if not isinstance(vocab, list):
        raise ValueError("model.vocab must hold the tokens")
    ids = {entry[0]: number for number, entry in enumerate(vocab)}
    if len(ids) < len(vocab):
        raise ValueError("a token appears twice in model.vocab")
    return ids


def _read_slow(source: Source) -> Vocabulary:
    own = _parse(source, SLOW)
    added = _parse(source, SLOW_ADDED) if SLOW_ADDED in source.files else {}
    settings = read_json(source, TOKENIZER_CONFIG) if TOKENIZER_CONFIG in source.files else {}
    decoder = settings.get(DECODER)
    entries = decoder.values() if isinstance(decoder, dict) else ()
    known = {entry["content"]: entry for entry in entries}
    return _vocabulary(own, {token: {**known.get(token, {}), "id": i, "content": token} for token, i in added.items()})


def _vocabulary(own: dict[str, int], added: Mapping[str, Mapping[str, Any]]) -> Vocabulary:
    """Raises ValueError if ids are no numbers from 0, or two tokens share one, or one token has two."""
    ids = dict(own)
    for token, entry in added.items():
        if ids.setdefault(token, entry["id"]) != entry["id"]:
            raise ValueError(f"the token {token!r} has the ids {ids[token]} and {entry['id']}")
    for token, number in ids.items():
        if not isinstance(token, str) or type(number) is not int or not 0 <= number < 1 << 31:
            raise ValueError(f"the id of the token {token!r} is {number!r}, no whole number from 0 to {(1 << 31) - 1}")
    if len(set(ids.values())) < len(ids):
        seen: dict[int, str] = {}
        twice = next((seen[i], token, i) for token, i in ids.items() if seen.setdefault(i, token) != token)
        raise ValueError(f"the tokens {twice[0]!r} and {twice[1]!r} share the id {twice[2]}")
    last = max((ids[token] for token in added), default=-1)
    return Vocabulary(ids, added, last + 1 if last >= len(own) else len(own))


def _parse(source: Source, file: str) -> dict[str, Any]:
    """A JSON object in which no key appears twice. Raises ValueError."""
    if source.files[file].size > JSON_BYTES:
        raise ValueError(f"it has {source.files[file].size:,} bytes, more than the {JSON_BYTES:,} that are read")
    content = parse_json(source.fetch(file).read_bytes(), object_pairs_hook=_no_duplicates)
    if not isinstance(content, dict):
        raise ValueError(f"it must hold a JSON object, but holds a {type(content).__name__}")
    return content


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        raise ValueError("a token or field appears twice in it")
    return seen

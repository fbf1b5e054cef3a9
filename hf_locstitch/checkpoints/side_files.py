"""The files beside the weights: config, tokenizer, processor, chat templates, licence. Copied byte for byte.

They are an allow list: what transformers, tokenizers, processors and sentence-transformers load, by the names in those
libraries, and what the config says is the model's own code. A folder may hold anything else: keys, logs, optimizers.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from hf_locstitch.checkpoints.checkpoint import (
    CONFIG,
    QUANTIZATION,
    STEMS,
    Checkpoint,
    index_file,
    read_json,
    read_json_list,
    single_file,
)
from hf_locstitch.checkpoints.names import is_own, same_place
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.files import write_text

WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot",
    ".tflite", ".npz", ".npy", ".pkl", ".mlmodel", ".mlpackage",
)  # fmt: skip
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
MODULES = "modules.json"  # of sentence-transformers: which folder holds which module
# JSON files whose `auto_map` names Python files.
MAPPED = (
    CONFIG, "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
# Tokenizers, in the order of how common they are.
TOKENIZER = (
    "tokenizer.json", "tokenizer.[0-9]*.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.spm", "*.tiktoken", "*.bpe", "bpe.codes", "dict.txt", "tekken.json",
    "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model", "spm_char.model", "ice_text.model",
    "tokenizer.model", "tokenizer.model.v*", "tiktoken.model", "prophetnet.tokenizer", "encoder.json",
    "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json", "byte_maps.json", "normalizer.json",
    "emoji.json", "word_shape.json", "word_pronunciation.json",
)  # fmt: skip
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TEMPLATES = ("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja")
# Loaded from a model's folder, and from that of a module of sentence-transformers.
LOADED = (
    # transformers: models and processors; a name with a version is for some releases only
    "config.json", "config.[0-9]*.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "audio_tokenizer_config.json",
    *TOKENIZER, "chat_template.json", "chat_template.jinja",
)  # fmt: skip
LOADED_FROM_ROOT = (
    "additional_chat_templates/*.jinja",
    # processors with parts of their own: a decoder with a language model, voices
    "alphabet.json", "language_model/attrs.json", "language_model/unigrams.txt", "language_model/*.arpa",
    "language_model/*.bin", "language_model/*.binary", "speaker_embeddings_path.json", "speaker_embeddings/*.npy",
    # sentence-transformers
    MODULES, "config_sentence_transformers.json", "sentence_*_config.json", "router_config.json",
)  # fmt: skip
LOADED_FROM_MODULE = (
    "sentence_*_config.json", "router_config.json", "cnn_config.json", "lstm_config.json", "wordembedding_config.json",
    "whitespacetokenizer_config.json", "phrasetokenizer_config.json", "idf.json", "*.safetensors",
    "*.safetensors.index.json",
)  # fmt: skip
LEGAL = re.compile(
    r"[\w .-]*(licen[cs]e|notice|copying|copyright|patents|use[-_ ]policy|third[-_ ]party)[\w -]*"
    r"(\.(txt|md|rst|pdf|html|\d+))?",
    re.IGNORECASE,
)
# Python's relative imports, as text: the code of a model is never run, and need not even parse. A parenthesis that is
# never closed takes the rest, so that no text is searched twice.
RELATIVE = re.compile(r"^[ \t]*from[ \t]+\.(?!\.)([\w.]*)[ \t]+import[ \t]+(\([^)]*|[^\n#]+)", re.MULTILINE)

LARGEST_CODE = 1 << 20  # bytes; larger Python files are not searched for imports


@dataclass(frozen=True)
class SideFiles:
    """Of one checkpoint. copied: in its order. left: what nothing says that the model needs, or a merge writes anew.

    made: file -> content, of those that are another model's, or edited.
    """

    copied: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    made: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def left_weights(self) -> list[str]:
        """Safetensors files that belong to no model as it is loaded; other formats hold the same weights again."""
        return [file for file in self.left if file.endswith(".safetensors")]


def choose_side_files(checkpoint: Checkpoint, also: Sequence[str] = ()) -> SideFiles:
    """Which files go along with a checkpoint's weights. also: globs of more files, over whole paths.

    Raises CheckpointError if a file that says so is malformed.
    """
    source, files = checkpoint.source, list(checkpoint.source.files)
    ours = {shard.file for shard in checkpoint.shards} | {*map(single_file, STEMS), *map(index_file, STEMS)}
    free = [file for file in files if file not in ours and not is_own(file)]
    asked = {file for file in free if matching(file, also)}
    modules = list_modules(source)
    folders = {path for path, _ in modules}
    wanted = asked | {file for file in free if _is_loaded(file, folders)}
    wanted |= _code(source, [name for _, name in modules]) & set(free)
    return SideFiles(tuple(file for file in free if file in wanted), tuple(file for file in free if file not in wanted))


def check_side_files(source: Source, chosen: SideFiles) -> None:
    """Raises CheckpointError if a file cannot be copied, or the model could not be loaded from those that are."""
    if twice := same_place(chosen.copied):
        raise CheckpointError(
            f"{source.label} has {' and '.join(twice)}, which are one file where names have no case. Rename one."
        )
    for file in chosen.copied:
        source.cached(file)  # refuses a link that leads out of the folder
    _check_modules(source, [path for path, _ in list_modules(source)], chosen)


def matching(file: str, globs: Sequence[str]) -> bool:
    """Case-sensitive; `*` goes beyond "/"."""
    return any(fnmatchcase(file, glob) for glob in globs)


def copy_side_files(checkpoint: Checkpoint, files: SideFiles, folder: Path, dtype: str) -> None:
    """Copy into `folder`. They stay unchanged, except for config.json: it gets `dtype` unless that is "auto", and is
    that of a model without quantization."""
    for file in (*files.copied, *files.made):
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file in files.made:
            target.write_bytes(files.made[file])
        else:
            shutil.copyfile(checkpoint.source.fetch(file), target)
    config = folder / CONFIG
    if config.exists() and (dtype != "auto" or checkpoint.dequantized):
        fields = json.loads(config.read_text(encoding="utf-8"))
        write_text(config, json.dumps(_changed(fields, dtype), indent=2) + "\n")


def _changed(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    config.pop(QUANTIZATION, None)
    if dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    return config


def _is_loaded(file: str, modules: Collection[str]) -> bool:
    """Judging by names alone. modules: folders."""
    name, in_module = file.rsplit("/", 1)[-1], _in_module(file, modules)
    if _fits(file, LOADED_FROM_ROOT) or (in_module and matching(name, LOADED_FROM_MODULE)):
        return True
    return ("/" not in file or in_module) and (matching(name, LOADED) or LEGAL.fullmatch(name) is not None)


def _fits(file: str, globs: Sequence[str]) -> bool:
    """As `matching`, but `*` stays in its folder."""
    return any(file.count("/") == glob.count("/") and fnmatchcase(file, glob) for glob in globs)


def _in_module(file: str, modules: Collection[str]) -> bool:
    return any(str(folder) in modules for folder in PurePosixPath(file).parents)  # the model's own is "." here


def list_modules(source: Source) -> list[tuple[str, str]]:
    """(folder, class) of each module of sentence-transformers; the folder "" is the model's own."""
    if MODULES not in source.files:
        return []
    try:
        listed = [(str(PurePosixPath(entry["path"])), str(entry["type"])) for entry in read_json_list(source, MODULES)]
        return [("" if path == "." else path, kind) for path, kind in listed]
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f"{source.label}/{MODULES} is not a list of modules with path and type. Fetch it again."
        ) from error


def _check_modules(source: Source, folders: Sequence[str], chosen: SideFiles) -> None:
    """Raises CheckpointError if modules would lack their weights, or bring those of the model itself along."""
    if folders and "" not in folders:
        raise CheckpointError(
            f"{source.label}/{MODULES} puts the model in {folders[0]}/, so sentence-transformers would not load the "
            "merged weights. Save the model again with SentenceTransformer(...).save_pretrained(folder)."
        )
    modules = set(folders)
    pickled = [file for file in chosen.left if file.endswith(PICKLED) and _in_module(file, modules)]
    safe = {file.rsplit("/", 1)[0] for file in chosen.copied if file.endswith((".safetensors", *PICKLED))}
    if lost := [file for file in pickled if file.rsplit("/", 1)[0] not in safe]:
        raise CheckpointError(
            f"{source.label} has the weights of a module in {lost[0]} only, a file that can run code when loaded: it "
            "is not copied, and without it the merge cannot be loaded. Save the model again with "
            f"SentenceTransformer(...).save_pretrained(folder), or copy it nevertheless: --also-copy {lost[0]}."
        )


def _code(source: Source, classes: Sequence[str]) -> set[str]:
    """Python files that configs name, and those that they import. They are read as text and never run."""
    waiting = [
        reference.rpartition(".")[0].replace(".", "/") + ".py"
        for reference in [*classes, *_auto_mapped(source)]
        if "--" not in reference  # of another repo
    ]
    found: set[str] = set()
    while waiting:
        file = waiting.pop()
        if file in source.files and file not in found:
            found.add(file)
            waiting += _imported(source, file)
    return found


def _auto_mapped(source: Source) -> Iterator[str]:
    """References such as "modeling_x.XModel"."""
    for file in MAPPED:
        if file in source.files:
            mapped = read_json(source, file).get("auto_map")
            values = list(mapped.values()) if isinstance(mapped, dict) else [mapped]
            listed = [one for value in values for one in (value if isinstance(value, list) else [value])]
            yield from (one for one in listed if isinstance(one, str))  # null: no such tokenizer


def _imported(source: Source, file: str) -> Iterator[str]:
    """Files that a Python file imports from beside it."""
    if source.files[file].size > LARGEST_CODE:
        return
    folder, _, _ = file.rpartition("/")
    text = source.fetch(file).read_text(encoding="utf-8", errors="replace")
    for module, names in RELATIVE.findall(text):
        modules = [module] if module else re.findall(r"\w+", names)
        for one in modules:
            path = one.replace(".", "/")
            for place in (f"{path}.py", f"{path}/__init__.py"):
                yield f"{folder}/{place}" if folder else place


def check_processor(models: Sequence[Checkpoint], purpose: str) -> None:
    """Raises CheckpointError if none of these models has the files of a tokenizer or processor, by their names.

    models: the one that is to be run, and those whose files serve it, too. purpose: what needs it.
    """
    files = [file for model in models for file in model.source.files]
    if any(fnmatchcase(file, glob) for file in files for glob in (*TOKENIZER, *PROCESSORS)):
        return
    first, *others = (model.label for model in models)
    raise CheckpointError(
        f"{first} has no tokenizer{f', nor has {others[0]}' if others else ''} (no {TOKENIZER[0]} or the like), and "
        f"{purpose} needs one. Save it beside the weights: "
        f"AutoTokenizer.from_pretrained(REF).save_pretrained({first!r})."
    )

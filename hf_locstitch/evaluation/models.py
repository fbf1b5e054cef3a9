"""The models that are evaluated: what identifies their content, and where transformers finds them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import Literal

from hf_locstitch.artifacts.manifest import open_manifest
from hf_locstitch.checkpoints.checkpoint import Checkpoint, open_source
from hf_locstitch.checkpoints.config import architecture
from hf_locstitch.checkpoints.opening import read_checkpoint
from hf_locstitch.checkpoints.pairing import paired
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.checkpoints.side_files import check_processor, choose_side_files
from hf_locstitch.checkpoints.vocabulary import token_matrices
from hf_locstitch.errors import CheckpointError, LocstitchError, MismatchError, RecipeError
from hf_locstitch.inspection.verification.inputs import input_refs as recorded_refs
from hf_locstitch.runtime.every import every
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.runtime.version import __version__
from hf_locstitch.tasks.custom_code import refuse_custom_code

Role = Literal["model", "base", "finetuned", "average"]


@dataclass(frozen=True)
class Model:
    """name: the title of its column. ref: pinned. content: a hash of everything in the model that may change scores."""

    name: str
    role: Role
    ref: str
    content: str
    checkpoint: Checkpoint | None = None
    average_of: tuple[str, ...] = field(default=(), repr=False)

    def fetch(self, progress: Progress) -> None:
        """Put its files on this machine, with a bar if some are not there yet. Raises as `folder`."""
        if self.checkpoint is None:
            return
        source = self.checkpoint.source
        absent = [file for file in needed(self.checkpoint) if not source.local and source.cached(file) is None]
        if not absent:
            return
        with progress.bar("fetching", sum(source.files[file].size for file in absent)) as advance:
            for file in absent:
                source.fetch(file, advance)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder with its files; an average is made here and removed afterwards."""
        if self.checkpoint is not None:
            yield fetch(self.checkpoint)
            return
        with tempfile.TemporaryDirectory(prefix="hf-locstitch-average-", ignore_cleanup_errors=True) as folder:
            made = Path(folder) / "model"
            make_average(self.average_of, made)
            yield made


class Inputs(Mapping[str, Model]):
    """What a merge was made of: its base, called "base", and its finetunes, each opened when it is asked for."""

    def __init__(self, opening: Mapping[str, Callable[[], Model]]) -> None:
        self._opening = opening
        self._opened: dict[str, Model] = {}

    def __getitem__(self, name: str) -> Model:
        if name not in self._opened:
            self._opened[name] = self._opening[name]()
        return self._opened[name]

    def __contains__(self, name: object) -> bool:
        return name in self._opening  # without opening it

    def __iter__(self) -> Iterator[str]:
        return iter(self._opening)

    def __len__(self) -> int:
        return len(self._opening)


def open_model(ref: str, role: Role, name: str | None = None) -> Model:
    """Raises CheckpointError unless `ref` holds a whole model."""
    parsed = parse_ref(ref)
    return model_of(read_checkpoint(open_source(parsed)), role, name or parsed.name)


def model_of(checkpoint: Checkpoint, role: Role, name: str) -> Model:
    """An open checkpoint of a whole model."""
    return Model(name, role, checkpoint.source.pinned, content_of(checkpoint), checkpoint)


def content_of(checkpoint: Checkpoint) -> str:
    """One hash of weights, config, tokenizer, templates; the same for a folder and a repo of the same files."""
    source = checkpoint.source
    digests = {file: source.files[file].sha256 or source.sha256(file) for file in needed(checkpoint)}
    return _hash(f"{file} {digest}" for file, digest in sorted(digests.items()))


def average_model(base: Model, parents: Sequence[Model], refs: Sequence[str]) -> Model:
    """The plain average of the parents, made by the merge engine when needed. refs: of the base and the parents."""
    content = _hash(["average", __version__, base.content, *(parent.content for parent in parents)])
    names = ", ".join(parent.name for parent in parents)
    return Model("average", "average", f"plain average of {names}", content, average_of=tuple(refs))


def _hash(lines: Iterator[str] | Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_language_model(checkpoint: Checkpoint) -> None:
    """Judges by config and file names only. Raises CheckpointError."""
    from transformers.models.auto import modeling_auto

    label, config = checkpoint.label, checkpoint.config
    if not config.get("model_type"):
        raise CheckpointError(
            f"{label} has no config.json with a model_type, so transformers cannot load it. Name a complete model; "
            "merge an adapter into its base first."
        )
    refuse_custom_code(checkpoint, "lm-eval")
    named = architecture(config)
    known = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    if named not in {name for mapping in known for names in mapping.values() for name in _listed(names)}:
        raise CheckpointError(
            f"{label} is not a language model that generates text: its config has the architecture "
            f"{named or 'nothing'!r} ({config['model_type']}). lm-eval runs causal and sequence-to-sequence "
            "models; evaluate this one with a tool for its own task."
        )
    check_processor([checkpoint], "lm-eval")


def _listed(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def needed(checkpoint: Checkpoint) -> list[str]:
    """The files that transformers loads it from."""
    return [*(shard.file for shard in checkpoint.shards), *choose_side_files(checkpoint).copied]


def fetch(checkpoint: Checkpoint) -> Path:
    """The folder that holds weights, config and tokenizer. Raises DownloadError or IntegrityError."""
    source = checkpoint.source
    for file in needed(checkpoint):
        source.fetch(file)
    return source.fetch("config.json").parent


def make_average(refs: Sequence[str], out: Path) -> None:
    """refs: the base's, then the finetunes'. What these do not share, such as heads of their own, is left out."""
    from hf_locstitch.engine.execute import make
    from hf_locstitch.engine.preflight import check_disk
    from hf_locstitch.plan.planning import make_plan
    from hf_locstitch.plan.recipe import make_recipe

    base, *parents = refs
    entries = [{"ref": ref, "name": f"parent-{number}"} for number, ref in enumerate(parents, start=1)]
    fields = {"base": base, "finetuned": entries, "method": "average"}
    try:
        plan = make_plan(make_recipe(fields))
    except MismatchError:
        plan = make_plan(make_recipe({**fields, "exclude": not_shared(refs)}))
    check_disk(out, plan)
    make(plan, out, Progress(False))


def not_shared(refs: Sequence[str]) -> list[str]:
    """Tensors that not all of these models have, in one shape but for tokens, as globs. refs: the base's first."""
    base, *others = (read_checkpoint(open_source(parse_ref(ref))) for ref in refs)
    of_tokens = frozenset(token_matrices(base))
    found: set[str] = set()
    for other in (paired(base, one) for one in others):
        found |= base.tensors.keys() ^ other.tensors.keys()
        shared = base.tensors.keys() & other.tensors.keys() - of_tokens
        found |= {name for name in shared if base.info(name).shape != other.info(name).shape}
    return sorted(map(escape, found))


def input_refs(
    ref: str, base: str | None, finetuned: Sequence[str] | None, *, needed: bool
) -> tuple[str | None, dict[str, str]]:
    """Where the base and the finetunes are: as given, or else (if needed) as the manifest of the merge `ref` says.

    Returns the base's ref and name -> ref. Raises RecipeError or CheckpointError.
    """
    if not needed or (base is not None and finetuned is not None):
        names = [parse_ref(one).name for one in finetuned or ()]
        unique = names if len(set(names)) == len(names) else list(finetuned or ())
        return base, dict(zip(unique, finetuned or (), strict=True))
    record = open_manifest(open_source(parse_ref(ref)))
    roles = {entry.name: entry.role for entry in record.inputs}
    refs: Mapping[str, str] = {one.name: one.ref for one in recorded_refs(record, base, finetuned)}
    return (
        next((refs[name] for name, role in roles.items() if role == "base"), None),
        {name: refs[name] for name, role in roles.items() if role != "base"},
    )


def gather_models(
    refs: Sequence[str],
    *,
    base: str | None = None,
    finetuned: Sequence[str] | None = None,
    parents: bool = False,
    average: bool = False,
) -> list[Model]:
    """The base, its finetunes and their average, as requested, then the models `refs`. Raises RequestError."""
    models = every([partial(open_model, ref, "model") for ref in refs])
    base_ref, others = input_refs(refs[0], base, finetuned, needed=parents or average)
    if average and (base_ref is None or not others):
        raise RecipeError("--average needs the base and the finetunes. Name them with --base REF and --ft REF...")
    with naming_inputs() if parents or average else nullcontext():
        of_base = [partial(open_model, base_ref, "base", "base")] if base_ref is not None else []
        compared = every([*of_base, *(partial(open_model, ref, "finetuned", name) for name, ref in others.items())])
    base_model, parent_models = (compared[0] if of_base else None), compared[len(of_base) :]
    if average and base_model is not None and base_ref is not None:
        compared.append(average_model(base_model, parent_models, [base_ref, *others.values()]))
    return with_own_names([*compared, *models])


@contextmanager
def naming_inputs() -> Iterator[None]:
    """An input that cannot be opened where a manifest says that it is can be named."""
    try:
        yield
    except LocstitchError as error:
        raise CheckpointError(f"{error} Name the merge's inputs with --base REF and --ft REF...") from error


def known_inputs(ref: str, base: str | None, finetuned: Sequence[str] | None, opened: Sequence[Model] = ()) -> Inputs:
    """The base and the finetunes of the merge `ref`, as given or as its manifest names them; of another model those
    that are given. opened: models that need not be opened again."""
    try:
        base_ref, others = input_refs(ref, base, finetuned, needed=True)
    except LocstitchError:  # no merge: each model is judged by its own head
        base_ref, others = input_refs(ref, base, finetuned, needed=False)
    known = {model.name: model for model in opened if model.role in ("base", "finetuned")}

    def opening(name: str, role: Role, where: str) -> Callable[[], Model]:
        def known_or_opened() -> Model:
            with naming_inputs():
                return known[name] if name in known else open_model(where, role, name)

        return known_or_opened

    base_entry = {"base": opening("base", "base", base_ref)} if base_ref is not None else {}
    return Inputs(base_entry | {name: opening(name, "finetuned", where) for name, where in others.items()})


def with_own_names(models: Sequence[Model]) -> list[Model]:
    """Models with unique names: where two have the same name, the later one is named by its ref."""
    named: dict[str, Model] = {}
    for model in models:
        taken = sum(name == model.name or name.startswith(f"{model.ref} (") for name in named)
        name = model.name if not taken else model.ref if model.ref not in named else f"{model.ref} ({taken + 1})"
        named[name] = replace(model, name=name)
    return list(named.values())

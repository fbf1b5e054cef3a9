"""Whether models are finetunes of a base, judging by headers and configs, and which differences are worth a warning."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.config import model_types
from hf_locstitch.checkpoints.vocabulary import row_shape
from hf_locstitch.runtime.human import more

MOST_GLOBS = 3
PARTS = ("vision_config", "audio_config", "speech_config")  # of what is no text
Shape = tuple[int, ...]
DEEPEST = 8  # parts of a name in which a prefix ends


def mismatches(base: Checkpoint, other: Checkpoint, chosen: Sequence[str], finetuned: Sequence[str]) -> list[str]:
    """Why `other` is not a finetune of the base. chosen, finetuned: localized tensors of the base and of the other."""
    problems = []
    if not (_of_one_kind(base, other) or _is_text_of(base, other)):
        problems.append(
            f"{other.label} is a {other.config.get('model_type')} model, "
            f"the base {base.label} a {base.config.get('model_type')} model"
        )
    problems += _name_mismatches(base, other, chosen, finetuned)
    shared = [name for name in chosen if name in other.tensors]
    shapes = [(name, other.info(name).shape, base.info(name).shape) for name in shared]
    if wrong := [(name, got, due) for name, got, due in shapes if got != due]:
        name, got, due = wrong[0]
        problems.append(
            f"{name} is {list(got)} in {other.label} but {list(due)} in the base {base.label}{more(len(wrong))}; "
            "a finetune must share the base's shapes; leave tensors out with --exclude"
        )
    if packed := [name for name in shared if not other.info(name).floating]:
        problems.append(
            f"{packed[0]} is {other.info(packed[0]).dtype} in {other.label} "
            f"but {base.info(packed[0]).dtype} in the base{more(len(packed))}: "
            "quantized or packed weights cannot be compared; use the full-precision checkpoint"
        )
    return problems


def _of_one_kind(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether both are of one architecture, or one is a part of the other's, as a CLIP vision tower is of a CLIP model.

    Also if one states none.
    """
    own, others = one.config.get("model_type"), other.config.get("model_type")
    return not own or not others or str(own) in model_types(other.config) or str(others) in model_types(one.config)


def _is_text_of(base: Checkpoint, other: Checkpoint) -> bool:
    """Whether the other may be a text model that a model of several parts was made from, as far as names of types tell:
    Qwen2-VL calls its own language model qwen2_vl_text, not qwen2. Shapes and a sample of weights tell the rest."""
    kind, text = base.config.get("model_type"), other.config.get("model_type")
    return str(kind).startswith(f"{text}_") and bool(_parts(base)) and not _parts(other)


def _parts(checkpoint: Checkpoint) -> list[str]:
    """The configs in a config that are of parts of the model."""
    return [key for key, value in checkpoint.config.items() if key in PARTS and isinstance(value, dict)]


def _name_mismatches(base: Checkpoint, other: Checkpoint, chosen: Sequence[str], finetuned: Sequence[str]) -> list[str]:
    missing = [name for name in chosen if name not in other.tensors]
    extra = [name for name in finetuned if name not in base.tensors]
    problems = []
    prefix = _common_prefix(missing, extra) if missing and extra else None
    if missing:
        cure = "" if prefix else f"; leave out what only the base has with --exclude {_globs(missing, base.tensors)}"
        problems.append(f"{other.label} lacks {missing[0]}, which the base {base.label} has{more(len(missing))}{cure}")
    if extra:
        cure = "" if prefix else f"; leave it out with --exclude {_globs(extra, other.tensors)}"
        problems.append(f"{other.label} has {extra[0]}, which the base {base.label} lacks{more(len(extra))}{cure}")
    if prefix:
        problems[-1] += f" (one side's names begin with {prefix!r}: save both models with the same class)"
    return problems


def _globs(names: Sequence[str], tensors: Iterable[str]) -> str:
    """The shortest globs of whole prefixes (`'mtp.*'`) that match these names and no other tensor; three at most."""
    taken = {prefix for other in set(tensors) - set(names) for prefix in _prefixes(other)}
    globs: list[str] = []
    for name in names:
        if not any(fnmatchcase(name, glob) for glob in globs):
            globs.append(next((f"{prefix}*" for prefix in _prefixes(name) if prefix not in taken), name))
        if len(globs) > MOST_GLOBS:
            break
    return " ".join(f"'{glob}'" for glob in globs[:MOST_GLOBS]) + (" …" if len(globs) > MOST_GLOBS else "")


def _common_prefix(missing: Sequence[str], extra: Sequence[str]) -> str | None:
    """The prefix that alone tells the two sets of names apart, if there is one."""
    for longer, shorter in ((missing, extra), (extra, missing)):
        names = set(shorter)
        for name in longer:
            if prefix := next((prefix for prefix in _prefixes(name) if name.removeprefix(prefix) in names), None):
                return prefix
    return None


def _prefixes(name: str) -> list[str]:
    """`a.` and `a.b.` of `a.b.c`."""
    parts = name.split(".", DEEPEST)
    return [".".join(parts[:count]) + "." for count in range(1, len(parts))]


def differences(
    base: Checkpoint, name: str, other: Checkpoint, chosen: Sequence[str], by_tokens: Collection[str] = ()
) -> list[str]:
    """Differences that do not prevent the merge, as warnings. by_tokens: tensors whose number of rows is none."""
    localized = set(chosen)
    unlike = [
        f"{tensor} {list(other.info(tensor).shape)} (base {list(base.info(tensor).shape)})"
        for tensor in base.tensors
        if tensor not in localized
        and tensor in other.tensors
        and not _alike(other.info(tensor).shape, base.info(tensor).shape, tensor in by_tokens)
    ]
    unlike += [f"{tensor} (not in the base)" for tensor in other.tensors if tensor not in base.tensors]
    unlike += [f"{t} (only in the base)" for t in base.tensors if t not in other.tensors and t not in localized]
    warnings = []
    if not _of_one_kind(base, other):
        kinds = base.config.get("model_type"), other.config.get("model_type")
        warnings.append(
            f"{name} is a {kinds[1]} model, the base a {kinds[0]} model: {name} is taken for one of its language model."
        )
    if unlike:
        shown = ", ".join(unlike[:3]) + more(min(len(unlike), len(unlike) - 2))
        warnings.append(f"{name} differs outside the localized tensors: {shown}. The base's are kept.")
    if all(t in other.tensors for t in chosen) and other.layout is other:  # an adapter's dtypes are our choice
        warnings += dtype_warnings(name, [(other.info(t).dtype, base.info(t).dtype) for t in chosen])
    return warnings


def _alike(one: Shape, other: Shape, by_tokens: bool) -> bool:
    return row_shape(one) == row_shape(other) if by_tokens and one and other else one == other


def misfit_files(files: Checkpoint, unmasked_from: Checkpoint) -> tuple[list[str], list[str]]:
    """Why config and tokenizer of one checkpoint do not describe a model whose unmerged tensors are another's.

    Returns problems, for which transformers would refuse the model, and warnings.
    """
    if files is unmasked_from:
        return [], []
    shared = [name for name in files.tensors if name in unmasked_from.tensors]
    problems, warnings = [], []
    if unlike := [name for name in shared if files.info(name).shape != unmasked_from.info(name).shape]:
        name = unlike[0]
        kept, asked = (list(one.info(name).shape) for one in (unmasked_from, files))
        problems.append(
            f"{name} is {kept} in {unmasked_from.label} but {asked} in {files.label}{more(len(unlike))}: with the "
            "weights of the one and the config of the other the merge "
            "would not load. Take both from one model: give rest_from and files_from the same name, or neither"
        )
    if lost := [name for name in files.tensors if name not in unmasked_from.tensors]:
        warnings.append(
            f"the config is that of {files.label}, which has {lost[0]}{more(len(lost))}; the merge does not: unless it "
            "is a tied weight, it will be random numbers when the merge is loaded. rest_from of the same name keeps it."
        )
    return problems, warnings


def dtype_warnings(name: str, dtypes: Iterable[tuple[str, str]]) -> list[str]:
    """dtypes: of each localized tensor, in the finetune and in the base."""
    return [
        f"{name} is {finetuned} where the base is {base}: compared in float32, cast to {base}."
        for finetuned, base in sorted(set(dtypes))
        if finetuned != base
    ]


def swap_signs(base: Checkpoint, finetuned: Mapping[str, Checkpoint]) -> tuple[list[str], list[str]]:
    """What tells that base and finetune may have changed places: the base's card names a finetune as its own base.

    Returns problems, and warnings: it is a problem if the other finetunes name the same one, and none the base.
    """
    problems, warnings = [], []
    for name, checkpoint in finetuned.items():
        repo = checkpoint.source.repo
        if repo is None or repo not in parents_of(base):
            continue
        others = {other: parents_of(one) for other, one in finetuned.items() if other != name}
        said = f"the card of the base {base.label} says that it was made from {repo}, which is given as a finetune"
        if any(repo in parents for parents in others.values()) and all(
            base.source.repo not in parents for parents in others.values()
        ):
            listed = " ".join(str(one.source.repo or one.label) for other, one in finetuned.items() if other != name)
            problems.append(
                f"{said}, and so do those of other finetunes: base and finetune are swapped; use --base {repo} --ft "
                f"{base.source.repo or base.label} {listed}"
            )
        else:
            warnings.append(f"{said}: base and finetune may be swapped. If they are, use --base {repo}.")
    return problems, warnings


def parents_of(checkpoint: Checkpoint) -> frozenset[str]:
    """The repos that a model's card says it was made from."""
    named = checkpoint.card.get("base_model")
    return frozenset(str(one) for one in (named if isinstance(named, list) else [named]) if one)


def other_parent(base: Checkpoint, checkpoint: Checkpoint) -> list[str]:
    """A sentence where the card of a model says that it was made from others than this base."""
    parents = parents_of(checkpoint)
    if not parents or base.source.repo is None or base.source.repo in parents:
        return []
    made_from = " and ".join(sorted(parents))
    return [
        f"{checkpoint.label} was made from {made_from}, as its card says, not from {base.source.repo}: only finetunes "
        f"of one base can be merged; leave it out, or merge it with finetunes of {made_from}"
    ]


def licence_warning(checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    licences = {name: str(checkpoint.card.get("license", "none named")) for name, checkpoint in checkpoints.items()}
    if len(set(licences.values())) == 1:
        return []
    listed = ", ".join(f"{name}: {licence}" for name, licence in licences.items())
    return [f"the licences differ ({listed}): a merge is bound by all of them."]

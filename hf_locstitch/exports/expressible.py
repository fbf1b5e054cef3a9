"""What an export over a base can hold of a merge, judging by its recipe and by its tensors' shapes and dtypes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.errors import RequestError
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.runtime.human import more

EXPRESSED = ("F32", "F16", "BF16")  # dtypes of tensors whose changes a float32 can tell

Shape = tuple[int, ...]


def check_masked(label: str, recipe: Recipe, *, masked: bool, new_rows: bool) -> None:
    """Raises RequestError unless all that a merge changes in its base lies under masks.

    new_rows: whether it has rows of tokens that finetunes added.
    """
    if not masked:
        raise RequestError(
            f"{label} is merged by {recipe.method.name}, without masks: it changes its base everywhere, and an export "
            "would be as large as the model. Use the merged model itself, or merge by locstitch."
        )
    if new_rows:
        raise RequestError(
            f"{label} has rows of embeddings and heads from its finetunes' tokens, which no mask covers: an export "
            "over the base would lack them. Merge with --tokenizer base --embeddings base, or use the merged model "
            "itself."
        )
    for key, value in (("rest_from", recipe.rest_from), ("files_from", recipe.files_from)):
        if value is not None and value != "base":
            what = "the tensors outside its masks" if key == "rest_from" else "config and tokenizer"
            raise RequestError(
                f"{label} has {what} from {value} ({key} in the recipe), and not from the base, which an export leaves "
                f"as it is. Merge without {key}, or use the merged model itself."
            )


def misfits(label: str, base: Checkpoint, changed: Iterable[tuple[str, Shape]]) -> Iterator[str]:
    """Why tensors of a base cannot be changed by an export. changed: with the shapes that their masks have."""
    where = f"the base {base.label}"
    if base.dequantized:
        yield (
            f"{where} is stored in {base.dequantized}, and would be loaded so under an adapter, where {label} has "
            "bfloat16; use a whole merged model"
        )
    for name, shape in changed:
        if name not in base.tensors:
            yield f"{label} changes {name}, which {where} does not have"
            continue
        info = base.info(name)
        if info.shape != shape:
            yield f"{name} is {list(shape)} in {label} but {list(info.shape)} in {where}"
        elif info.dtype not in EXPRESSED:
            yield f"{name} is {info.dtype} in {where}; an adapter can change {', '.join(EXPRESSED)}"


def unlike(label: str, base: Checkpoint, merged: Mapping[str, tuple[str, Shape]]) -> Iterator[str]:
    """What of a merge is no change under masks. merged: name -> dtype and shape of each of its tensors."""
    where = f"the base {base.label}"
    if alone := sorted(merged.keys() ^ base.tensors.keys()):
        yield f"only {label if alone[0] in merged else where} has {alone[0]}{more(len(alone))}"
    both = [(name, merged[name], base.info(name)) for name in sorted(merged.keys() & base.tensors.keys())]
    for number, cause in ((1, "an adapter cannot change shapes"), (0, "as after a merge with --dtype")):
        if other := [(name, own, due) for name, own, due in both if own[number] != (due.dtype, due.shape)[number]]:
            name, (dtype, shape), due = other[0]
            yield (
                f"{name} is {dtype} {list(shape)} in {label} but {due.dtype} {list(due.shape)} in {where}"
                f"{more(len(other))}, {cause}"
            )

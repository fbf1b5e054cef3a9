"""The order in which finetunes are summed: by what they are, however they were given. Sums round, so it decides bytes.

Pinned refs say what a finetune is; those of folders say only the folder's own name, and content tells two of one name
apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from hf_locstitch.artifacts.manifest import Manifest, weights_sha256
from hf_locstitch.checkpoints.checkpoint import Checkpoint

Content = tuple[str, ...]  # hashes: of the finetuned weights, and of a localized checkpoint's files


def summing_order(refs: Mapping[str, str], content: Callable[[str], Content]) -> tuple[str, ...]:
    """Names of finetunes in order. refs: pinned, by name. content: of one, asked for only where a ref is shared.

    What has the same ref and content is ordered by name.
    """
    times = Counter(refs.values())
    return tuple(sorted(refs, key=lambda name: (refs[name], content(name) if times[refs[name]] > 1 else (), name)))


def order_of_checkpoints(finetuned: Mapping[str, Checkpoint]) -> tuple[str, ...]:
    """Of finetunes at hand. Folders of the same name are hashed."""

    def content(name: str) -> Content:
        one = finetuned[name]
        pinned = one.source.commit is not None  # its ref says it all
        return () if pinned else (weights_sha256({file: one.source.sha256(file) for file in one.files}),)

    return summing_order({name: one.source.pinned for name, one in finetuned.items()}, content)


def recorded_order(record: Manifest) -> tuple[str, ...]:
    """Of the finetunes of a merge, as it had them."""
    inputs = {entry.name: entry for entry in record.inputs if entry.role != "base"}

    def content(name: str) -> Content:
        through = record.localized.get(name)
        return (weights_sha256(inputs[name].files), weights_sha256(through.files) if through else "")

    return summing_order({name: entry.ref for name, entry in inputs.items()}, content)

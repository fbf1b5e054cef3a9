"""What a merge was made of: models, and the localized checkpoints that finetunes came through, where it is a stitch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint, open_localized
from hf_locstitch.artifacts.manifest import Manifest
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.errors import LocstitchError
from hf_locstitch.inspection.verification.inputs import InputRef, open_inputs


@dataclass(frozen=True)
class Parts:
    """models: the base and finetunes that can be opened. localized: by finetune, the localized checkpoints that values
    are taken from. unknown: finetunes whose values under the mask are in a localized checkpoint that cannot be read,
    and why. missing: why values cannot be checked at all; empty if they can.
    """

    models: Mapping[str, Checkpoint]
    localized: Mapping[str, LocalizedCheckpoint] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""


def open_parts(record: Manifest, refs: Sequence[InputRef]) -> Parts:
    """Raises CheckpointError for an input that the user named and that cannot be opened.

    Values of a refitted localized checkpoint are nowhere else. Those of others are taken from the finetuned model if it
    is at hand, so that the merge is compared with the model itself.
    """
    opened, faults, named = _open_localized(record, {ref.name: ref for ref in refs})
    recorded = {entry.name: entry.ref for entry in record.inputs}
    models, reasons = open_inputs(
        [InputRef(ref.name, recorded[ref.name], asked=False) if ref.name in named else ref for ref in refs]
    )
    refitted = {name for name, mask in record.masks.items() if mask.refitted}
    refitted |= {name for name, one in opened.items() if one.refitted}
    localized = {name: one for name, one in opened.items() if name in refitted or name not in models}
    unknown = {name: faults.get(name, "none is recorded") for name in sorted(refitted - localized.keys())}
    missing = [reason for name, reason in reasons.items() if name not in {*localized, *unknown}]
    return Parts(models, localized, unknown, " ".join(missing))


def _open_localized(
    record: Manifest, refs: Mapping[str, InputRef]
) -> tuple[dict[str, LocalizedCheckpoint], dict[str, str], set[str]]:
    """Those that can be read, where the user says or else where the manifest does; why others cannot be; and the names
    of those that are where the user says."""
    opened: dict[str, LocalizedCheckpoint] = {}
    faults: dict[str, str] = {}
    named: set[str] = set()
    for name, entry in record.localized.items():
        asked = [refs[name].ref] if name in refs and refs[name].asked else []
        for ref in (*asked, entry.ref):
            try:
                opened[name] = open_localized(parse_ref(ref))
            except LocstitchError as error:
                faults[name] = str(error)
                continue
            named |= {name} if ref in asked else set()
            break
    return opened, faults, named

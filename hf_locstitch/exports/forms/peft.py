"""A PEFT adapter over the base: SHiRA, sparse and exact in 16 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_locstitch.exports.form import Form, FormPlan
from hf_locstitch.runtime.files import write_text
from hf_locstitch.runtime.human import counted, human

if TYPE_CHECKING:
    from hf_locstitch.exports.adapter_layout import AdapterLayout
    from hf_locstitch.exports.changes import Changes
    from hf_locstitch.runtime.progress import Progress


EXCLUDE_BIASES = "localized with --exclude '*.bias', linear layers with biases can be stored by entries, too"


class PeftAdapter(Form):
    def plan(self, changes: Changes) -> FormPlan:
        from hf_locstitch.exports.adapter_layout import Changed, lay_out

        return AdapterPlan(changes, lay_out(Changed(changes.label, changes.kind, changes.base, changes.ones)))


class AdapterPlan(FormPlan):
    def __init__(self, changes: Changes, layout: AdapterLayout) -> None:
        self.changes, self.layout, self.nbytes = changes, layout, layout.nbytes
        self.facts = {
            "peft_type": "SHIRA",
            "model_class": layout.class_name,
            "changed": sum(changes.ones.values()),
            "bytes": self.nbytes,
            "base_bytes": sum(shard.size for shard in changes.base.shards),
            "mergeable": layout.mergeable,
            "r": layout.rank,
            "entries": layout.entries,
            "sparse": [layer.module for layer in layout.sparse],
            "whole": {module.module: module.why for module in layout.whole},
        }

    def describe(self) -> list[str]:
        from hf_locstitch.exports.adapter_layout import BIASED

        layout, facts = self.layout, self.facts
        lines = [
            f"adapter    SHiRA for {facts['model_class']}, {human(self.nbytes)} (the base has "
            f"{human(facts['base_bytes'])})",
            f"sparse     {counted(len(layout.sparse), 'linear layer')}, {layout.entries:,} entries (r = {layout.rank});"
            f" {facts['changed']:,} weights lie under masks",
        ]
        if layout.whole:
            lines.append(
                f"whole      {counted(len(layout.whole), 'module')} at full size, {human(layout.whole_bytes)}: "
                f"{layout.why}"
            )
        if any(module.why == BIASED for module in layout.whole):
            lines.append(f"hint       {EXCLUDE_BIASES}")
        return lines

    def write(self, folder: Path, name: str, progress: Progress) -> dict[str, Any]:
        from hf_locstitch.checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
        from hf_locstitch.exports.adapter_card import write_card
        from hf_locstitch.exports.adapter_weights import write_weights

        inexact = write_weights(folder / ADAPTER_WEIGHTS, self.layout, self.changes, progress)
        config = json.dumps(self.layout.config(), indent=2) + "\n"
        write_text(folder / ADAPTER_CONFIG, config)
        write_card(folder / "README.md", self.changes, self.layout, self.facts, name, inexact)
        return {"inexact": inexact}


COMPONENT = PeftAdapter

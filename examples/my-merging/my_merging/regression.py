"""An objective: a head with one output, judged by the squared error."""

from typing import ClassVar, Literal

import torch

from hf_locstitch.tasks.objective import Objective
from hf_locstitch.tasks.task import Task


class Regression(Objective):
    """Rows: `text` and `label`, a number. max_length: tokens; longer texts lose their ends."""

    kind: Literal["regression"] = "regression"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    max_length: int = 128

    def prepare(self, rows, processor, base):
        examples = [(row["text"], float(row["label"])) for row in rows]
        limit = {"padding": True, "truncation": True, "max_length": self.max_length}

        def outputs(model, batch):
            tokens = processor([text for text, _ in batch], **limit, return_tensors="pt")
            return model(**tokens.to(model.device)).logits  # [examples, 1]

        def loss(model, batch):
            found = outputs(model, batch).float().squeeze(-1)
            return (found - torch.tensor([label for _, label in batch], device=found.device)).square().sum()

        return Task(examples, [1] * len(examples), loss, outputs, logits=False)

"""The authors' published code, as it is in a checkout of theirs: https://github.com/uiuctml/Localize-and-Stitch.

Its modules are imported unchanged. Stood in for are what transformers 5 no longer has (the readers of GLUE's files and
`GlueDataTrainingArguments`), the scores that `evaluate` would download, `sentence_transformers` (demonstrations in
prompts, which they do not use), and the whole of `vision`, which needs torchvision and open_clip and is not asked for
anything with a RoBERTa. Of their scripts `main_*.py`, which have their models' paths written into them, the settings
are read and the calls are made here in the same order.
"""

from __future__ import annotations

import ast
import csv
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import transformers

Mask = Mapping[str, torch.Tensor]  # tensor -> bool, its shape
State = Mapping[str, torch.Tensor]
DATALESS, WITH_DATA = "main_dataless_localize_stitch.py", "main_localize_stitch.py"


@dataclass
class InputExample:
    """As transformers 4 had it."""

    guid: str
    text_a: str
    text_b: str | None = None
    label: Any = None


@dataclass(frozen=True)
class InputFeatures:
    """As transformers 4 had it."""

    input_ids: list[int]
    attention_mask: list[int] | None = None
    token_type_ids: list[int] | None = None
    label: int | float | None = None


class DataProcessor:
    """As transformers 4 had it, as far as its heirs need it."""

    @classmethod
    def _read_tsv(cls, path: str) -> list[list[str]]:
        with open(path, encoding="utf-8-sig") as file:
            return list(csv.reader(file, delimiter="\t"))


class Accuracy:
    """As `evaluate.load("accuracy")`."""

    def __init__(self) -> None:
        self.right: list[bool] = []

    def add_batch(self, predictions: torch.Tensor, references: torch.Tensor) -> None:
        self.right += (predictions.cpu() == references.cpu()).tolist()

    def compute(self) -> dict[str, float]:
        return {"accuracy": sum(self.right) / len(self.right)}


def _unused(*_: Any) -> Any:
    raise NotImplementedError("a stand-in that the benchmark of RoBERTa must not need")


def _stand_in(name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__path__ = []
    vars(module).update(attributes)
    sys.modules[name] = module


def _stand_in_for_all() -> None:
    for name in ("transformers.data.processors", "transformers.data.processors.glue", "vision", "vision.src",
                 "vision.src.vision_datasets"):  # fmt: skip
        _stand_in(name)
    _stand_in("transformers.data.processors.utils", InputFeatures=InputFeatures)
    _stand_in("transformers.data.metrics", glue_compute_metrics=_unused)
    importlib.import_module("transformers.models.roberta.modeling_roberta")  # which registers transformers anew
    lazy = {"DataProcessor": DataProcessor, "InputExample": InputExample, "GlueDataTrainingArguments": None}
    vars(sys.modules["transformers"]).update(lazy)
    _stand_in("evaluate", load=lambda _: Accuracy())
    _stand_in("sentence_transformers", SentenceTransformer=None, util=None)
    _stand_in("vision.src.vision_datasets.common", maybe_dictionarize=_unused)
    _stand_in("vision.src.eval", eval_single_dataset=_unused)
    _stand_in("vision.src.modeling", ImageClassifier=None)
    _stand_in("vision.src.heads", get_classification_head=_unused)
    _stand_in("vision.src.utils", get_logits=_unused)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the authors' code, and the bars in it, print."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def settings_of(script: Path) -> dict[str, float]:
    """The constants that a script of theirs assigns to attributes of `graft_args`."""
    statements = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.Assign)]
    assigned = [(ast.unparse(node.targets[0]), node.value) for node in statements]
    return {
        target.removeprefix("graft_args."): ast.literal_eval(value)
        for target, value in assigned
        if target.startswith("graft_args.")
    }


class AuthorsCode:
    """checkout: a folder with their repository. base, finetuned: folders of RoBERTas, by the authors' task names; data:
    folders of few-shot sets as LM-BFF writes them. work: for what their code leaves behind.
    """

    def __init__(
        self, checkout: Path, base: Path, finetuned: Mapping[str, Path], data: Mapping[str, Path], work: Path
    ) -> None:
        _stand_in_for_all()
        sys.path[:0] = [str(checkout), str(checkout / "language")]
        self.utils = importlib.import_module("localize_utils")
        self.model_class = importlib.import_module("src.models").RobertaForPromptFinetuning
        self.model_class.all_tied_weights_keys = {}  # which transformers 5 sets in post_init, which they do not call
        self.sets = importlib.import_module("src.dataset")
        self.parse_data_arguments: Callable[[str], Any] = importlib.import_module("args").parse_data_arguments
        self.settings = {name: settings_of(checkout / "language" / name) for name in (DATALESS, WITH_DATA)}
        self.data, self.work = data, work
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        self.final, self.pretrained = self._load(base), self._load(base)
        self.finetuned = {task: self._load(folder) for task, folder in finetuned.items()}
        self.localizable = {
            name: value for name, value in self.pretrained.named_parameters() if "encoder.layer" in name
        }

    def _load(self, folder: Path) -> Any:
        config = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")
        return self.model_class.from_pretrained(folder, config=config)

    def examples(self, task: str) -> Any:
        """Their data set, which makes prompts as it is iterated over."""
        with quiet(), patch.object(sys, "argv", ["authors"]):
            args = self.parse_data_arguments(task)
            args.data_dir, args.overwrite_cache = str(self.data[task]), True
            return self.sets.FewShotDataset(args, tokenizer=self.tokenizer, mode="train", use_demo=False)

    def _localizer(self, task: str, script: str) -> Any:
        with quiet():
            return self.utils.Localizer(
                self.localizable, self.final, self.pretrained, self.finetuned[task], task, SimpleNamespace(),
                SimpleNamespace(**self.settings[script]), model_type="roberta",
            )  # fmt: skip

    def localize(self, task: str) -> Mask:
        """As their dataless script. As there, the model keeps the task vector under the mask, until `stitch`."""
        localizer = self._localizer(task, DATALESS)
        with quiet():
            found, _ = localizer.interpolate_model(round_=True, return_mask=True)
        return self._named(found)

    def train_mask(self, task: str, seed: int) -> Mask:
        """As their script with data. seed: of the order of examples."""
        examples = self.examples(task)
        self.final.label_word_list = torch.tensor(examples.label_word_list).long()
        localizer = self._localizer(task, WITH_DATA)
        with quiet():
            arguments = transformers.TrainingArguments(str(self.work / "trainer"), use_cpu=True, seed=seed)
            trainer = transformers.Trainer(self.pretrained, arguments, train_dataset=examples)
            found, _, _ = localizer.train_graft(trainer.get_train_dataloader(), task)
        return self._named(found)

    def stitch(self, masks: Sequence[Mask]) -> State:
        """As their scripts, onto the model as it is; afterwards that has its pretrained values again."""
        weights = [[mask[name].float() for name in self.localizable] for mask in masks]
        models = list(self.finetuned.values())
        stitched = self.utils.Stitcher(self.localizable, self.final, self.pretrained, models, weights)
        state = {name: value.detach().clone() for name, value in stitched.interpolate_models().named_parameters()}
        self.final.load_state_dict(self.pretrained.state_dict())
        return state

    def _named(self, mask: Sequence[torch.Tensor]) -> Mask:
        return {name: values.bool() for name, values in zip(self.localizable, mask, strict=True)}

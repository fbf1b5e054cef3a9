"""Training by transformers' Trainer, with the loss that localizing and judging take, too; adapters by PEFT."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from re import search
from typing import Any

import torch
import transformers
from torch import nn

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.localizable import unknown_globs
from hf_locstitch.checkpoints.tensors import TORCH_DTYPE
from hf_locstitch.errors import RecipeError, RequestError, WorkError
from hf_locstitch.runtime.human import some
from hf_locstitch.runtime.progress import Advance, Progress
from hf_locstitch.tasks.loading import find_device, link_files, load_config, load_model, load_processor
from hf_locstitch.tasks.sets import read_rows
from hf_locstitch.tasks.task import Task
from hf_locstitch.training.planning import FinetunePlan

NO_TRAINING = "A finetune needs a base that transformers supports without remote code: choose another --base."
LORA_SCALE = 2  # lora_alpha / rank, as is usual


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' report of heads that the base lacks, which are to be trained."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@_silent()
def train(plan: FinetunePlan, folder: Path, progress: Progress) -> tuple[Any, dict[str, Any]]:
    """The trained model, or PEFT's of one, and what is to be told of its training.

    folder: for links to the base's files. Raises RequestError, or WorkError if the loss does not stay finite.
    """
    request, training = plan.request, plan.training
    device = find_device(request.device)
    transformers.set_seed(request.seed)
    files = link_files(plan.base, folder / "base")
    config, rows = load_config(files, plan.base.label, NO_TRAINING), read_rows(plan.data)
    plan.objective.settle(config, rows)
    model, absent = load_model(files, plan.objective, config, torch.float32)
    task = plan.objective.prepare(rows, load_processor(plan.objective, files), model)
    trained = _trained(plan, [name for name, _ in model.named_parameters()], absent)
    model = _with_adapter(model, trained, absent, request.lora) if request.lora else _frozen(model, trained)
    steps = training.epochs * math.ceil(len(task.examples) / training.batch)
    with progress.bar("training", steps, " steps") as advance:
        losses = _run(plan, model, task, folder / "trainer", device, advance)
    if not all(map(math.isfinite, losses)):
        raise WorkError(
            f"the loss became {losses[-1]} in epoch {len(losses)} of {training.epochs}. Lower the learning rate (now "
            f"{training.lr:g})."
        )
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    facts = {"examples": len(task.examples), "steps": steps, "trained": count, "losses": losses}
    return model.to("cpu"), facts


def save(model: Any, base: Checkpoint, folder: Path) -> None:
    """As transformers and PEFT save it; whole models in the dtypes that the base has on disk."""
    if hasattr(model, "peft_config"):
        for config in model.peft_config.values():  # it names the folder of links
            config.base_model_name_or_path = base.source.repo or Path(base.label).name
            config.revision = base.source.commit
    else:
        dtypes = Counter(info.dtype for _, info in base.tensors.values() if info.floating)
        usual = dtypes.most_common(1)[0][0]
        for name, parameter in model.named_parameters():
            dtype = base.info(name).dtype if name in base.tensors else usual
            parameter.data = parameter.data.to(TORCH_DTYPE[dtype])
    model.save_pretrained(folder)


def _trained(plan: FinetunePlan, names: Sequence[str], absent: Collection[str]) -> set[str]:
    """Which parameters are trained. absent: those that the base lacks, which begin at random and always are."""
    globs = plan.request.freeze or ()
    if unknown := unknown_globs(names, globs, plan.base.label, "parameter"):
        raise RecipeError(f"freeze: {'; '.join(unknown)}.")
    chosen = {name for name in names if search(plan.training.trained, name)}
    chosen -= {name for name in names if any(fnmatchcase(name, glob) for glob in globs)}
    if not chosen:
        raise RecipeError(f"freeze leaves none of the {len(names)} parameters to be trained. Freeze fewer.")
    if plan.training.trained and (lacking := [name for name in names if name in absent and name not in chosen]):
        raise RequestError(
            f"{plan.base.label} lacks {some(lacking)}, without which {plan.objective.kind} means nothing. Use a base "
            "with its head, or another objective."
        )
    return chosen | {name for name in names if name in absent}


def _frozen(model: Any, trained: Collection[str]) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def _with_adapter(model: Any, trained: Collection[str], absent: Collection[str], rank: int) -> Any:
    """PEFT's model of a LoRA on linear layers whose weight is trained, but for the output layer of a language model;
    what the base lacks is trained whole."""
    import peft

    linear, output = (nn.Linear, transformers.pytorch_utils.Conv1D), model.get_output_embeddings()
    new = _new_modules(model, absent)
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, linear) and module is not output and f"{name}.weight" in trained
    ]
    layers = [name for name in layers if not any(name == one or name.startswith(f"{one}.") for one in new)]
    if not layers:
        raise RecipeError("no linear layer is left for a LoRA adapter. Freeze fewer parameters.")
    settings: Mapping[str, Any] = {"r": rank, "lora_alpha": LORA_SCALE * rank, "target_modules": layers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what it asks transformers for
        return peft.get_peft_model(model, peft.LoraConfig(**settings, modules_to_save=new or None))


def _new_modules(model: Any, absent: Collection[str]) -> list[str]:
    """The outermost modules that the base has nothing of, or lacks a parameter of."""
    found = {name.rpartition(".")[0] for name in absent}
    for name, module in model.named_modules():
        own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
        if own and own <= set(absent):
            found.add(name)
    return sorted(name for name in found if not any(name.startswith(f"{other}.") for other in found))


class _Trainer(transformers.Trainer):
    """task: whose loss is trained with."""

    def __init__(self, task: Task, **options: Any) -> None:
        super().__init__(**options)
        self._task = task

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over a batch's units. Several devices in one process are not used."""
        loss = self._task.loss(getattr(model, "module", model), inputs["examples"]) / inputs["units"]
        return (loss, {}) if return_outputs else loss


class _Following(transformers.TrainerCallback):
    """advance: called with the number of steps just made."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._advance(1)


def _run(
    plan: FinetunePlan, model: Any, task: Task, folder: Path, device: torch.device, advance: Advance
) -> list[float]:
    """Train in place; returns the mean loss of each epoch."""
    training, seed = plan.training, plan.request.seed
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch,
        learning_rate=training.lr,
        optim=training.optimizer,
        lr_scheduler_type="linear",
        seed=seed,
        data_seed=seed,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else its own data parallelism would make the batches larger
    trainer = _Trainer(
        task,
        model=model,
        args=arguments,
        train_dataset=list(zip(task.examples, task.weights, strict=True)),
        data_collator=lambda batch: {"examples": [one for one, _ in batch], "units": sum(unit for _, unit in batch)},
        callbacks=[_Following(advance)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

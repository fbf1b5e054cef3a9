"""`finetune`: a base and examples in, a checkpoint or an adapter out, in a folder, a repo, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_locstitch.checkpoints.checkpoint import CARD, CONFIG
from hf_locstitch.checkpoints.side_files import SideFiles, choose_side_files, copy_side_files
from hf_locstitch.engine.delivery import Delivered, Delivery, make_target
from hf_locstitch.engine.preflight import check_output_given
from hf_locstitch.engine.work_dir import WorkDir
from hf_locstitch.plan.recipe_file import load_recipe
from hf_locstitch.runtime.escape import line
from hf_locstitch.runtime.files import write_text
from hf_locstitch.runtime.progress import Progress, hide_all_library_bars
from hf_locstitch.training.planning import FinetunePlan, plan_finetune
from hf_locstitch.training.request import FinetuneRequest, make_request

RECIPE = "finetune.yaml"
SAVED = (CONFIG, "generation_config.json")  # files that transformers writes anew


@dataclass(frozen=True)
class FinetuneResult(Delivered):
    """The result of a finetune.

    Attributes:
        out: The folder; None if it was only pushed.
        url: URL of the pushed repo; None if it was not pushed.
        commit: Commit of the pushed repo, 40 hex digits.
        facts: What was trained, as plain values: `examples`, `steps`, `trained` (the number of parameters) and
            `losses`, the mean of each epoch.
    """

    def describe(self) -> str:
        """A summary to print."""
        losses = self.facts["losses"]
        loss = f"loss       {losses[0]:.4g} in the first epoch, {losses[-1]:.4g} in the last"
        return "\n".join(map(line, [*self.places("finetuned"), loss]))


def finetune(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    base: str | Path | None = None,
    data: str | Path | Mapping[str, Any] | None = None,
    number: int | None = None,
    objective: str | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    push_to: str | None = None,
    private: bool | None = None,
    create_pr: bool | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    batch: int | None = None,
    optimizer: str | None = None,
    freeze: Sequence[str] | None = None,
    lora: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    show_progress: bool | None = None,
) -> FinetuneResult:
    """Finetune a base on labelled examples, or on answers, so that the result can be merged at once.

    Args:
        recipe: A YAML file or its fields; arguments that are given override it.
        base: The pretrained model: a folder, org/name or org/name@revision.
        data: A task of the paper by name, such as "sst2", a surrogate, a file, a data set org/name[@revision], or the
            fields of a localization set.
        number: How many examples, or of each class; 64 by default.
        objective: What is to be learned, by kind or with its settings; by default as the task or the base's
            architecture has it.
        out: A folder that does not exist yet. At least one of `out` and `push_to` is needed.
        push_to: A repo, org/name or org/name@branch, to push the result to, in one commit.
        private: Whether a new repo is private.
        create_pr: Whether the result is proposed there as a pull request.
        epochs, lr, batch, optimizer: By default the objective's: SGD 2e-5, batch 4, 10 epochs for masked-lm, as in the
            paper; AdamW 1e-5, batch 128, 10 epochs for clip-zero-shot; AdamW 2e-5, batch 8, 3 epochs for the others.
            With `lora` AdamW 2e-4.
        freeze: Globs of parameters that stay the base's. By default all outside the transformer blocks for masked-lm,
            all outside the vision tower for clip-zero-shot, none for the others.
        lora: The rank of a LoRA adapter to train instead.
        seed: Of new heads, the order of examples and dropout; the same bytes again on the same machine.
        device: "auto" or "cpu".
        show_progress: None shows bars on a terminal only.

    Returns:
        Where the result is, and what was trained.

    Raises:
        RequestError: If the request cannot be carried out; nothing was written.
        WorkError: If the work fails; the same call starts it again.

    Example:
        >>> finetune(base="FacebookAI/roberta-base", data="sst2", out="sst2")  # doctest: +SKIP
    """
    fields = load_recipe(Path(recipe)) if isinstance(recipe, str | Path) else dict(recipe or {})
    given = {
        "base": None if base is None else str(base), "data": data, "out": out, "push_to": push_to, "private": private,
        "create_pr": create_pr, "epochs": epochs, "lr": lr, "batch": batch, "optimizer": optimizer, "freeze": freeze,
        "lora": lora, "seed": seed, "device": device,
    }  # fmt: skip
    fields |= {key: value for key, value in given.items() if value is not None}
    request = make_request(fields, number=number, objective=objective)
    check_output_given(request.out, request.push_to)
    return carry_out(plan_finetune(request), Progress(show_progress))


@hide_all_library_bars()
def carry_out(plan: FinetunePlan, progress: Progress, announce: Callable[[], object] = lambda: None) -> FinetuneResult:
    """Train, write the result, and publish it.

    announce: called once all is checked, before the work. Raises like `finetune`.
    """
    delivery = check_possible(plan)
    announce()

    def work(folder: WorkDir) -> dict[str, Any]:
        from hf_locstitch.training.card import write_card
        from hf_locstitch.training.train import save, train  # slow to import

        model, facts = train(plan, folder.spill, progress)
        save(model, plan.base, folder.stage)
        beside = choose_side_files(plan.base).copied
        own = SAVED if plan.request.lora is None else (CONFIG,)
        copy_side_files(plan.base, SideFiles(tuple(file for file in beside if file not in own)), folder.stage, "auto")
        write_text(folder.stage / RECIPE, plan.pinned.dump())
        write_card(folder.stage / CARD, plan, facts, delivery.repo)
        return facts

    message = f"Finetune {plan.base.label} on {plan.data.label} with hf-locstitch"
    facts, url, commit = delivery.make(plan.fingerprint, work, message, progress)
    return FinetuneResult(plan.request.out, url, commit, facts)


def check_possible(plan: FinetunePlan) -> Delivery:
    """Where the result goes, and all that must hold before the work. Raises RequestError."""
    from hf_locstitch.tasks.loading import find_device  # slow to import

    request: FinetuneRequest = plan.request
    delivery = Delivery("finetune", request.out, make_target(request.push_to, request.create_pr), request.private)
    if request.out is not None or request.push_to is not None:
        delivery.check({"base": plan.base.source}, plan.nbytes)
    find_device(request.device)
    return delivery

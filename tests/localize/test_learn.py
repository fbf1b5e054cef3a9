"""Gradients of S against autograd's own, through base + σ(S)·τ, for every objective and kind of model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import pair
from helpers.grafted import CASES, prepare

from hf_locstitch.errors import RequestError, WorkError
from hf_locstitch.localize.grafted_model import GraftedModel, keep_no_activations
from hf_locstitch.localize.learn import Room, learn_mask, saliency_scores, start_scores
from hf_locstitch.localize.localizers.mask import Mask
from hf_locstitch.localize.localizers.saliency import Saliency
from hf_locstitch.localize.updates import add_rounding, official_step, score_gradient
from hf_locstitch.runtime.positioned_io import OPEN_FILES_MOVE
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.tasks.passes import State
from hf_locstitch.tasks.task import Task, micro_batches

Tensors = dict[str, torch.Tensor]


def room(folder: Path) -> Room:
    return Room(folder, Processes())


def autograd(grafted: GraftedModel, task: Task, scores: Tensors, penalty: float) -> Tensors:
    """∂/∂S of the mean loss at base + σ(S)·τ, with the penalty, all in one graph."""
    leaves = {name: score.clone().requires_grad_() for name, score in scores.items()}
    model, parameters = grafted.model, grafted.parameters
    weights = {n: p.base + torch.sigmoid(leaves[n]) * (p.finetuned - p.base) for n, p in parameters.items()}

    class Functional:
        """The model, called with these weights."""

        device, dtype = model.device, model.dtype

        def __call__(self, **inputs: object) -> object:
            return torch.func.functional_call(model, weights, args=(), kwargs=inputs, tie_weights=True)

        config = model.config

        def get_output_embeddings(self) -> None:
            """It makes the logits of all tokens."""

        def get_image_features(self, **inputs: object) -> object:
            class Call(torch.nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.inner = model

                def forward(self, **inputs: object) -> object:
                    return self.inner.get_image_features(**inputs)

            inside = {f"inner.{name}": weight for name, weight in weights.items()}
            return torch.func.functional_call(Call(), inside, args=(), kwargs=inputs)

    loss = task.loss(Functional(), task.examples) / sum(task.weights)
    total = loss + penalty * sum(torch.sigmoid(leaf).sum() for leaf in leaves.values())
    total.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("micro_batch", [5, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_scores_is_autograds(case: str, micro_batch: int, tmp_path: Path) -> None:
    penalty = 1e-3
    grafted, task = prepare(case, pair(CASES[case][0], tmp_path))
    how = Mask(density=0.1, epochs=1, lr=1.0, relative_lr=False, penalty=penalty, micro_batch=micro_batch)
    start = {name: tensor.clone() for name, tensor in start_scores(how, grafted, room(tmp_path)).tensors.items()}
    scores, losses = learn_mask(how, grafted, task, room(tmp_path))
    due = autograd(grafted, task, start, penalty)
    assert due.keys() == scores.tensors.keys()
    moved = 0.0
    for name, gradient in due.items():
        torch.testing.assert_close(start[name] - scores.tensors[name], gradient, rtol=1e-9, atol=1e-12)
        moved = max(moved, (gradient - penalty * torch.sigmoid(start[name]) * torch.sigmoid(-start[name])).abs().max())
    assert moved > 1e-6 and losses[0] > 0.1  # the task's own part is not lost in the penalty's


@pytest.mark.parametrize("preset", ["default", "paper", "official"])
@pytest.mark.parametrize("case", ["tied", "mixtral"])
def test_a_whole_set_needs_one_number_an_element(
    case: str, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same S as from micro-batches, whose gradients are kept and added up."""
    folders = pair(CASES[case][0], tmp_path)
    found: list[tuple[State, list[float]]] = []
    for micro_batch, kept in ((5, ["scores"]), (2, ["scores", "gradient"])):
        states: list[str] = []

        class Counted(State):
            def __init__(
                self, parameters: Any, dtype: str, on: str, folder: Path, name: str, seen: Any = states
            ) -> None:
                super().__init__(parameters, dtype, on, folder, name)
                seen.append(name.removesuffix(".0"))

        monkeypatch.setattr("hf_locstitch.localize.learn.State", Counted)
        batch = {"batch": 5} if preset == "official" else {}
        how = Mask(preset=preset, density=0.1, epochs=2, micro_batch=micro_batch, **batch)
        found.append(learn_mask(how, *prepare(case, folders), room(tmp_path)))
        assert states == kept
    (whole, losses), (split, expected) = found
    assert losses == pytest.approx(expected, rel=1e-12) and losses[0] != losses[1]
    for name, score in whole.tensors.items():
        torch.testing.assert_close(score, split.tensors[name], rtol=1e-6, atol=1e-9)


def test_a_parameter_that_no_example_reaches_still_shrinks(tmp_path: Path) -> None:
    grafted, task = prepare("causal-lm", pair("llama", tmp_path))
    reached, *others = grafted.parameters.values()
    one = Task(task.examples, task.weights, lambda model, batch: reached.parameter.square().sum())
    how = Mask(density=0.1, epochs=1, lr=1.0, relative_lr=False, penalty=0.1, start=(0.0, 0.0))
    scores, _ = learn_mask(how, grafted, one, room(tmp_path))
    assert others and all((scores[masked] == -0.025).all() for masked in others)
    assert len(scores[reached].unique()) > 1


@pytest.mark.parametrize("case", ["causal-lm", "mixtral"])
def test_saliency_is_gradient_times_task_vector(case: str, tmp_path: Path) -> None:
    grafted, task = prepare(case, pair(CASES[case][0], tmp_path))
    found = saliency_scores(Saliency(at=(0.0, 0.5), micro_batch=2), grafted, task, room(tmp_path))
    total = {name: torch.zeros_like(masked.base) for name, masked in grafted.parameters.items()}
    for share in (0.0, 0.5):
        for masked in grafted.parameters.values():
            masked.graft(share)
        grafted.model.zero_grad()
        (task.loss(grafted.model, task.examples) / sum(task.weights)).backward()
        for name, masked in grafted.parameters.items():
            assert masked.parameter.grad is not None
            total[name] += masked.parameter.grad * (masked.finetuned - masked.base) / 2
            masked.parameter.grad = None
    for name, score in found.tensors.items():
        torch.testing.assert_close(score, total[name].abs(), rtol=1e-9, atol=1e-14)


def test_without_a_task_every_share_shrinks(tmp_path: Path) -> None:
    """The true L1: with a zero task gradient σ(S) falls everywhere, inside the initial mask and outside."""
    grafted, task = prepare("causal-lm", pair("llama", tmp_path))
    idle = Task(task.examples, task.weights, lambda model, batch: 0 * task.loss(model, batch))
    how = Mask(density=0.1, epochs=2, lr=1.0, relative_lr=False, penalty=0.1)
    start = {name: tensor.clone() for name, tensor in start_scores(how, grafted, room(tmp_path)).tensors.items()}
    scores, _ = learn_mask(how, grafted, idle, room(tmp_path))
    for name, score in scores.tensors.items():
        assert (torch.sigmoid(score) < torch.sigmoid(start[name])).all()


def test_initial_mask_is_the_top_k_of_the_task_vector(tmp_path: Path) -> None:
    grafted, _ = prepare("mixtral", pair("mixtral", tmp_path))
    scores = start_scores(Mask(density=0.037, start=(-1.0, 2.0)), grafted, room(tmp_path))
    magnitudes = torch.cat([(masked.finetuned - masked.base).abs().flatten() for masked in grafted.parameters.values()])
    inside = torch.cat([scores[masked].flatten() for masked in grafted.parameters.values()]) == 2.0
    assert int(inside.sum()) == int(0.037 * len(magnitudes))
    assert magnitudes[inside].min() >= magnitudes[~inside].max()
    assert (
        (scores[next(iter(grafted.parameters.values()))] == 2.0) | (scores.tensors[min(scores.tensors)] == -1.0)
    ).all()


def test_official_is_the_authors_update(tmp_path: Path) -> None:
    """Against a plain transcription: sums over batches, a regulariser of the wrong sign, one step an epoch."""
    grafted, task = prepare("causal-lm", pair("llama", tmp_path))
    fields = {"density": 0.1, "start_density": 0.1, "lr": 30.0, "penalty": 1e-3, "epochs": 3, "batch": 2}
    how = Mask(preset="official", micro_batch=1, **fields)
    parameters = grafted.parameters
    mask = {n: t.clone() for n, t in start_scores(how, grafted, room(tmp_path)).tensors.items()}
    assert {float(v) for m in mask.values() for v in m.unique()} == {-5.0, 5.0}
    scores, _ = learn_mask(how, grafted, task, room(tmp_path))

    for _ in range(3):
        for name, masked in parameters.items():
            masked.parameter.data = masked.base + torch.sigmoid(mask[name]) * (masked.finetuned - masked.base)
        total = {name: torch.zeros_like(value) for name, value in mask.items()}
        for first in (0, 2, 4):
            examples, weights = task.examples[first : first + 2], task.weights[first : first + 2]
            grafted.model.zero_grad()
            (task.loss(grafted.model, examples) / sum(weights)).backward()
            for name, masked in parameters.items():
                assert masked.parameter.grad is not None
                total[name] += masked.parameter.grad
        for name, masked in parameters.items():
            sigmoid = torch.sigmoid(mask[name])
            derivative = sigmoid * (1 - sigmoid)
            regulariser = 1e-3 * torch.where(mask[name] > 0, derivative, -derivative)
            step = total[name] * (masked.finetuned - masked.base) * derivative
            mask[name] = mask[name] - (30.0 * step - regulariser)
    for name, score in scores.tensors.items():
        torch.testing.assert_close(score, mask[name], rtol=0, atol=1e-6)
        assert (score.abs() - 5).abs().max() > 1e-5  # it did move


def test_presets_of_the_authors_have_the_released_values(tmp_path: Path) -> None:
    language, vision = Mask(preset="official"), Mask(preset="official-vision")
    assert (language.penalty, language.batch, vision.penalty, vision.batch) == (10, 8, 1, 128)
    for how in (language, vision):
        assert (how.density, how.start_density, how.start, how.lr, how.epochs) == (None, 1e-5, (-5.0, 5.0), 1e7, 10)
        grafted, task = prepare("causal-lm", pair("llama", tmp_path / how.preset))
        learned = how.learn(grafted, task, room(tmp_path))  # of so few elements none starts inside
        assert learned.ones is not None and len(learned.losses) == 10


def test_batch_is_refused_where_it_does_nothing() -> None:
    for preset in ("default", "paper"):
        with pytest.raises(ValueError, match=f"batch does nothing in the preset {preset}"):
            Mask(preset=preset, batch=8)
        assert Mask.model_validate({"preset": preset, "batch": 16}) == Mask(preset=preset)  # as manifests record it
    assert Mask.model_validate(Mask(preset="official").model_dump(mode="json")) == Mask(preset="official")


PAPER = Mask(preset="paper", density=None)
WIDE = Mask(preset="paper", density=None, start_density=0.2)


@pytest.mark.parametrize(
    ("how", "ones", "said"),
    [
        (PAPER, 0, r"keeps 0 of 1,000 elements \(0 %\), where about 1 % .* empty.* lower the penalty \(now 1e-05\)"),
        (PAPER, 199, r"\(19.9 %\), .* saturated. Set a density, such as 0.01.* raise the penalty"),
        (Mask(preset="official"), 500, r"saturated. Set a density.*; or lower the lr"),
        (PAPER, 100, None),
        (WIDE, 199, None),
        (WIDE, 19, "almost empty"),
        (Mask(preset="paper", density=0.5), 0, None),
        (Saliency(), 0, None),
    ],
)
def test_rounded_masks_far_from_what_was_expected_are_doubted(how: Any, ones: int, said: str | None) -> None:
    doubt = how.doubt(ones, 1000)
    assert doubt is None if said is None else re.search(said, doubt), doubt


@pytest.mark.parametrize("on", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_and_how_the_state_is_kept(on: str, dtype: str, tmp_path: Path) -> None:
    folders = pair("llama", tmp_path, torch.float32)
    plain = Mask(density=0.1, epochs=2, micro_batch=2, lr=1.0, start=(0.0, 3.0))
    expected, _ = learn_mask(plain, *prepare("causal-lm", folders), room(tmp_path))
    how = plain.model_copy(update={"state_on": on, "state_dtype": dtype})
    scores, _ = learn_mask(how, *prepare("causal-lm", folders), room(tmp_path))
    for name, score in scores.tensors.items():
        assert score.dtype == getattr(torch, dtype)
        if dtype == "float32":
            assert torch.equal(score, expected.tensors[name])
        else:
            torch.testing.assert_close(score.float(), expected.tensors[name], rtol=0.02, atol=0.05)
    if OPEN_FILES_MOVE:  # elsewhere what is mapped goes with its folder
        assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "ft"]


def test_checkpointing_changes_no_score(tmp_path: Path) -> None:
    folders = pair("llama", tmp_path)
    expected, _ = learn_mask(Mask(epochs=1), *prepare("causal-lm", folders), room(tmp_path))
    grafted, task = prepare("causal-lm", folders)
    keep_no_activations(grafted.model)
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    grafted.model.model.layers[0].self_attn.register_forward_hook(count)
    scores, _ = learn_mask(Mask(epochs=1), grafted, task, room(tmp_path))
    assert forwards == 4  # two passes, for the length of the step and for the step, with a backward pass each
    for name, score in scores.tensors.items():
        torch.testing.assert_close(score, expected.tensors[name], rtol=1e-12, atol=1e-14)


def test_score_gradient_by_hand() -> None:
    """σ'(0) = 1/4: (2·3 + 0.4)/4 and (−1·2 + 0.4)/4."""
    found = score_gradient(torch.tensor([2.0, -1.0]), torch.tensor([3.0, 2.0]), torch.zeros(2), 0.4)
    torch.testing.assert_close(found, torch.tensor([1.6, -0.4]))


def test_official_regulariser_polarises() -> None:
    scores = torch.tensor([5.0, -5.0])
    after = official_step(scores, torch.zeros(2), torch.ones(2), 1e7, 1e-2)
    assert after[0] > 5 and after[1] < -5


def test_random_rounding_keeps_small_steps() -> None:
    """2000 steps of 1e-3 at 3: bfloat16 alone loses every one, random rounding keeps their sum in the mean."""
    generator = torch.Generator().manual_seed(0)
    plain, rounded = torch.full((4096,), 3.0).bfloat16(), torch.full((4096,), 3.0).bfloat16()
    for _ in range(2000):
        plain += 1e-3
        add_rounding(rounded, torch.full((4096,), 1e-3), generator)
    assert (plain == 3).all()
    assert abs(rounded.float().mean().item() - 5.0) < 0.02


def test_micro_batches_weigh_tokens() -> None:
    task = Task(["a", "b", "c"], [1, 2, 5], lambda model, batch: torch.zeros(()))
    assert [(list(b.examples), b.factor) for b in micro_batches(task, 2)] == [(["a", "b"], 1 / 8), (["c"], 1 / 8)]
    summed = list(micro_batches(task, 1, batch=2))
    assert [(list(b.examples), b.factor) for b in summed] == [(["a"], 1 / 3), (["b"], 1 / 3), (["c"], 1 / 5)]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(), RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")],
)  # fmt: skip
def test_running_out_of_memory_says_what_to_change(error: BaseException, tmp_path: Path) -> None:
    grafted, task = prepare("causal-lm", pair("llama", tmp_path))

    def full(model: object, batch: object) -> torch.Tensor:
        raise error

    with pytest.raises(WorkError, match="set micro_batch: 1, then checkpointing: true, then state_on"):
        saliency_scores(Saliency(), grafted, Task(task.examples, task.weights, full), room(tmp_path))
    assert all(not masked.parameter._post_accumulate_grad_hooks for masked in grafted.parameters.values())


def test_other_errors_pass(tmp_path: Path) -> None:
    grafted, task = prepare("causal-lm", pair("llama", tmp_path))

    def broken(model: object, batch: object) -> torch.Tensor:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        saliency_scores(Saliency(), grafted, Task(task.examples, task.weights, broken), room(tmp_path))


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    grafted, task = prepare("causal-lm", pair("llama", tmp_path))
    next(iter(grafted.parameters.values())).base[0] = float("nan")
    with pytest.raises(RequestError, match="the loss on the localization set is nan"):
        saliency_scores(Saliency(), grafted, task, room(tmp_path))


def test_no_relative_step_is_longer_than_lr(tmp_path: Path) -> None:
    """The k-th most changed element moves by half of lr (and 1/4096), none by all of it."""
    grafted, task = prepare("causal-lm", pair("llama", tmp_path))
    how = Mask(density=0.1, epochs=1, lr=0.7, start=(0.0, 0.0), start_density=0.05)
    scores, _ = learn_mask(how, grafted, task, room(tmp_path))
    moved = torch.cat([score.flatten().abs() for score in scores.tensors.values()])
    assert moved.max() < 0.7
    assert 0.35 - 1e-6 <= moved.sort(descending=True).values[int(0.05 * len(moved)) - 1] <= 0.3501

"""Passes through a model without weights: the outputs of the loaded model, whatever they stop at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers.families import MODELS, pair
from helpers.grafted import CASES
from helpers.models import load
from safetensors.torch import save_file
from torch import Tensor

from hf_locstitch.errors import RequestError
from hf_locstitch.runtime.processes import DistributedProcesses, Processes
from hf_locstitch.stitch.refit import states
from hf_locstitch.stitch.refit.lockstep import LockstepStop, Pair, lockstep
from hf_locstitch.stitch.refit.passes import Pass
from hf_locstitch.stitch.refit.states import InFile, InMemory, Shelf, States
from hf_locstitch.stitch.refit.stops import LinearStop
from hf_locstitch.stitch.refit.watching import watch
from hf_locstitch.stitch.refit.weights import Part, Weights, hollow
from hf_locstitch.tasks.empty_model import attach_conversions, empty_model
from hf_locstitch.tasks.task import Task

CPU = torch.device("cpu")


def open_pass(folder: Path, kind: str, work: Callable[[Any], Any], stops: Callable[[Part], bool]) -> Pass:
    objective = CASES[kind][1]
    state = load(folder)
    model = empty_model(objective.auto_class, transformers.AutoConfig.from_pretrained(folder), "")
    attach_conversions(model, list(state))
    parts = hollow(model, list(state), CPU)
    watch(model)
    weights = Weights(model, list(state), state.__getitem__, CPU)
    return Pass(weights, lambda: work(model), frozenset(name for name, part in parts.items() if stops(part)))


def product(one: Pass) -> Tensor | None:
    """What is due at a stop."""
    stop = one.stop
    if not isinstance(stop, LinearStop):
        return None
    weight = one.weights.load(stop.weight)
    bias = None if stop.bias is None else one.weights.load(stop.bias)
    return F.linear(stop.x, weight.T if stop.transposed else weight, bias)


def loaded_case(case: str, root: Path) -> tuple[Path, Task, Tensor, Any]:
    """The folder of a case's finetune, its task, what the loaded model gives, and its config."""
    kind, objective, rows, processor = CASES[case]
    _, folder = pair(kind, root, torch.float32)
    model = getattr(transformers, MODELS[kind][0]).from_pretrained(folder).eval()
    with torch.no_grad():
        task = objective.prepare(rows(), processor(), model)
        return folder, task, task.outputs(model, task.examples), model.config


@pytest.mark.parametrize("case", [case for case in CASES if case != "text"])
@pytest.mark.parametrize("stopping", [False, True])
def test_outputs_are_those_of_the_loaded_model(case: str, stopping: bool, tmp_path: Path) -> None:
    folder, task, due, _ = loaded_case(case, tmp_path)
    stops_at = (lambda part: part.dim > 1) if stopping else (lambda part: False)
    one = open_pass(folder, case, lambda model: task.outputs(model, task.examples), stops_at)
    one.start()
    stops = 0
    while one.stop is not None:
        stops += 1
        one.go_on(product(one))
    assert (stops > 7) == stopping
    assert torch.allclose(one.result, due, atol=1e-5)


def test_buffers_are_those_of_each_checkpoint(tmp_path: Path) -> None:
    """Routers' biases, which decide about experts; one that lacks them has those of a new model."""
    _, folder = pair("deepseek-v3", tmp_path, torch.float32)
    objective = CASES["causal-lm"][1]
    config = transformers.AutoConfig.from_pretrained(folder)
    model = empty_model(objective.auto_class, config, "")
    plain = load(folder)
    (name,) = (name for name in plain if name.endswith("e_score_correction_bias"))
    biased = {**plain, name: torch.tensor([0.0, 3.0, 0.0, 5.0])}
    lacking = {name: value for name, value in plain.items() if not name.endswith("e_score_correction_bias")}
    attach_conversions(model, list(plain))
    hollow(model, list(plain), CPU)
    watch(model)
    ids = torch.arange(12).view(2, 6)
    results = []
    for state in (plain, biased, lacking):
        one = Pass(
            Weights(model, list(state), state.__getitem__, CPU), lambda: model(input_ids=ids).logits, frozenset()
        )
        one.start()
        results.append(one.result)
        save_file({**plain, **state}, folder / "model.safetensors", metadata={"format": "pt"})
        with torch.no_grad():
            due = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
        assert torch.allclose(one.result, due, atol=1e-5)
    assert not torch.allclose(results[0], results[1], atol=1e-3) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("case", ["causal-lm", "gpt2", "mixtral", "masked-lm", "image-classification"])
@pytest.mark.parametrize("shelf", [InFile, InMemory])
def test_holds_nothing_while_it_waits(
    case: str, shelf: Callable[..., Shelf], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "SMALLEST", 1)
    folder, task, due, _ = loaded_case(case, tmp_path)
    one = open_pass(folder, case, lambda model: task.outputs(model, task.examples), lambda part: part.dim > 1)
    one.states = States(shelf(*([tmp_path / "states"] if shelf is InFile else [])))
    one.start()
    empty = 0
    while one.stop is not None:
        if isinstance(one.stop, LinearStop):
            own = "locstitch_own" in one.stop.x.__dict__  # else it is an input of the model
            assert (one.stop.x.untyped_storage().nbytes() == 0) == own
            empty += own
        with one.at_hand():
            answer = product(one)
        one.go_on(answer)
    assert empty > 7
    assert torch.allclose(one.result, due, atol=1e-5)


@pytest.mark.parametrize("case", ["causal-lm", "masked-lm", "gpt2"])
def test_waits_for_the_sum(case: str, tmp_path: Path) -> None:
    """A linear whose product is added to the residual stream is asked for there; the outputs are the same."""
    folder, task, due, config = loaded_case(case, tmp_path)
    sums: frozenset[Any] = frozenset()
    names: list[list[str]] = []
    for _ in range(2):
        one = open_pass(folder, case, lambda model: task.outputs(model, task.examples), lambda part: part.dim == 2)
        one.sums = sums
        one.start()
        names.append([])
        while one.stop is not None:
            assert isinstance(one.stop, LinearStop)
            assert (one.stop.residual is not None) == (one.stop.key in sums)
            if one.stop.residual is not None:
                assert torch.isfinite(one.stop.residual).all()
                names[-1].append(one.stop.weight.parameter)
            one.go_on(product(one))
        assert torch.allclose(one.result, due, atol=1e-5)
        sums = frozenset(one.added - one.used)
    assert not names[0]
    assert len(names[1]) == 2 * config.num_hidden_layers, names


def test_padding_is_left_out(tmp_path: Path) -> None:
    kind, objective, rows, processor = CASES["causal-lm"]
    _, folder = pair(kind, tmp_path, torch.float32)
    task = objective.prepare([*rows(), {"text": "abc"}], processor(), None)
    lengths = [len(ids) for ids, _ in task.examples]
    assert len(set(lengths)) > 1
    one = open_pass(folder, "causal-lm", lambda model: task.outputs(model, task.examples), lambda part: part.dim == 2)
    one.start()
    while one.stop is not None:
        assert isinstance(one.stop, LinearStop)
        x = one.stop.x
        if x.dim() == 3 and x.shape[0] == len(lengths):
            due = [row * x.shape[1] + at for row, length in enumerate(lengths) for at in range(length)]
            assert one.rows(x).tolist() == due
        one.go_on(product(one))


def stay(pairs: Sequence[Pair], meeting: LockstepStop) -> Callable[[], None]:
    """Nothing goes on."""
    return lambda: None


def test_an_order_that_depends_on_the_input_is_refused(tmp_path: Path) -> None:
    _, folder = pair("llama", tmp_path, torch.float32)

    def work(layer: int) -> Callable[[Any], Tensor]:
        return lambda model: model.model.layers[layer].mlp(torch.ones(1, 3, 32))

    passes = [open_pass(folder, "causal-lm", work(layer), lambda part: part.dim == 2) for layer in (0, 1)]
    with pytest.raises(
        RequestError, match=r"order .* depends on the input.*layers.0.mlp.gate.*layers.1.mlp.gate.*mean"
    ):
        lockstep([Pair(0, True, passes[0], passes[1])], stay, 1, Processes())
    assert not any(one._thread.is_alive() for one in passes)


def test_an_error_in_a_pass_ends_all(tmp_path: Path) -> None:
    _, folder = pair("llama", tmp_path, torch.float32)

    def broken(model: Any) -> Tensor:
        raise ValueError("broken")

    ids = torch.tensor([[1, 2, 3]])
    good = open_pass(folder, "causal-lm", lambda model: model(input_ids=ids).logits, lambda part: part.dim == 2)
    bad = open_pass(folder, "causal-lm", broken, lambda part: part.dim == 2)
    with pytest.raises(ValueError, match="broken"):
        lockstep([Pair(0, True, good, bad)], stay, 1, Processes())
    assert not good._thread.is_alive() and not bad._thread.is_alive()


class Threads(DistributedProcesses):
    """Threads of this process that stand for processes. shared: a barrier, and what each says."""

    def __init__(self, rank: int, shared: tuple[threading.Barrier, list[Any]]) -> None:
        Processes.__init__(self, rank, len(shared[1]))
        self._barrier, self._said = shared

    def gather(self, value: Any) -> list[Any]:
        self._said[self.rank] = value
        self._barrier.wait(60)
        found = list(self._said)
        self._barrier.wait(60)
        return found


def lead_all(pairs: Sequence[Sequence[Pair]], visits: list[tuple[int, Any]]) -> list[Future[None]]:
    """As many processes as there are lists of pairs. visits: of each, the keys of the places it is called at."""
    shared = threading.Barrier(len(pairs)), [None] * len(pairs)

    def run(rank: int) -> None:
        def visit(own: Sequence[Pair], meeting: LockstepStop) -> Callable[[], None]:
            visits.append((rank, meeting.place.key))

            def go_on() -> None:
                for two in own:
                    for one in two.passes:
                        one.go_on(product(one))

            return go_on

        lockstep(pairs[rank], visit, 1, Threads(rank, shared))

    with ThreadPoolExecutor(len(pairs)) as pool:
        return [pool.submit(run, rank) for rank in range(len(pairs))]


def test_processes_meet_at_every_stop(tmp_path: Path) -> None:
    """Those that have passes, and those that have none."""
    _, folder = pair("llama", tmp_path, torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    passes = [open_pass(folder, "causal-lm", lambda model: model(input_ids=ids).logits, lambda part: part.dim == 2)
              for _ in range(2)]  # fmt: skip
    visits: list[tuple[int, Any]] = []
    for done in lead_all([[], [Pair(0, True, passes[0], passes[1])], []], visits):
        done.result()
    keys = [[key for who, key in visits if who == rank] for rank in range(3)]
    assert keys[0] == keys[1] == keys[2] and len(keys[0]) > 7
    assert torch.equal(passes[0].result, passes[1].result)


@pytest.mark.parametrize("kind", ["an error", "another order"])
def test_what_goes_wrong_in_one_process_is_raised_in_each(kind: str, tmp_path: Path) -> None:
    _, folder = pair("llama", tmp_path, torch.float32)

    def work(layer: int) -> Callable[[Any], Tensor]:
        return lambda model: model.model.layers[layer].mlp(torch.ones(1, 3, 32))

    def broken(model: Any) -> Tensor:
        work(0)(model)
        raise OSError(5, "broken", "file")

    works = [work(0), work(0), work(0), broken if kind == "an error" else work(1)]
    passes = [open_pass(folder, "causal-lm", one, lambda part: part.dim == 2) for one in works]
    pairs = [[Pair(0, True, passes[0], passes[1])], [Pair(1, True, passes[2], passes[3])]]
    expected: Any = (OSError, "broken") if kind == "an error" else (RequestError, "order .* depends on the input")
    for done in lead_all(pairs, []):
        with pytest.raises(expected[0], match=expected[1]):
            done.result()
    assert not any(one._thread.is_alive() for one in passes)

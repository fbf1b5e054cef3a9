"""Localizing with data on a CUDA device: as on the CPU, and what a model of 8 B parameters takes.

Opt-in: python -m pytest -m gpu -s
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from demo.skills import make_tokenizer
from helpers.architectures import blocks
from helpers.families import pair
from helpers.models import load

from hf_locstitch.localize.grafted_model import GraftedModel, MaskedParameter, keep_no_activations, make_grafted_model
from hf_locstitch.localize.learn import Room, learn_mask, saliency_scores
from hf_locstitch.localize.localizers.mask import Mask
from hf_locstitch.localize.localizers.saliency import Saliency
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.tasks.loading import load_config, load_model
from hf_locstitch.tasks.objectives.causal_lm import CausalLM, answer_loss
from hf_locstitch.tasks.task import Task

pytestmark = pytest.mark.gpu
ROWS = [{"prompt": f"reverse {word}=", "completion": word[::-1]} for word in ("40718", "12345", "99990", "31415")]


def subject_on(device: str, folders: tuple[Path, Path]) -> tuple[GraftedModel, Task]:
    base_folder, folder = folders
    state, config = load(folder), load_config(folder)
    model, _ = load_model(folder, CausalLM(), config, torch.float64)
    base, absent = load_model(base_folder, CausalLM(), config, torch.float64)
    on = torch.device(device)
    grafted = make_grafted_model(model, base, absent, list(state), blocks(state), state.__getitem__, on, "ft")
    return grafted, CausalLM().prepare(ROWS, make_tokenizer(), None)


@pytest.mark.parametrize("on", ["device", "cpu", "disk"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_device_scores_as_the_cpu_does(kind: str, on: str, tmp_path: Path) -> None:
    folders = pair(kind, tmp_path)
    how = Mask(density=0.1, epochs=3, micro_batch=2, state_on=on)  # type: ignore[arg-type]
    room = Room(tmp_path, Processes())
    expected, _ = learn_mask(how, *subject_on("cpu", folders), room)
    found, _ = learn_mask(how, *subject_on("cuda", folders), room)
    for name, score in expected.tensors.items():
        assert found.tensors[name].device.type == ("cuda" if on == "device" else "cpu")
        torch.testing.assert_close(found.tensors[name].cpu(), score, rtol=1e-8, atol=1e-9)


def test_eight_billion_parameters_fit_48_gb(tmp_path: Path) -> None:
    """A Llama of 8 B random bfloat16 weights: peak memory, and time against forward and backward passes alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, dtype=torch.bfloat16, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.requires_grad_(False)
    keep_no_activations(model)
    parameters = {}
    for name, parameter in model.named_parameters():
        if ".layers." in name:
            parameter.requires_grad_(True)
            base = parameter.data.cpu()
            parameters[name] = MaskedParameter(name, parameter, base, base + 0.01 * base.abs())
    grafted = GraftedModel(model, parameters, ())
    rows = torch.randint(0, 128256, (8, 512)).tolist()
    task = Task([(row, row) for row in rows], [511] * 8, lambda m, batch: answer_loss(m, batch, 0))

    def passes() -> float:
        began = time.perf_counter()
        for first in range(0, 8, 2):
            (task.loss(model, task.examples[first : first + 2]) / (8 * 511)).backward()
            for parameter in model.parameters():
                parameter.grad = None
        torch.cuda.synchronize()
        return time.perf_counter() - began

    how = Saliency(micro_batch=2, state_dtype="bfloat16", checkpointing=True)
    room = Room(tmp_path, Processes())
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    saliency_scores(how, grafted, task, room)
    torch.cuda.synchronize()
    ours, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated()
    passes()
    ideal = passes()
    print(f"\npeak {peak / 1e9:.1f} GB; {ours:.1f} s in all, {ideal:.1f} s the passes alone")
    assert peak < 48e9


@pytest.mark.parametrize("kind", ["saliency", "mask"])
def test_the_plan_says_what_the_device_takes(kind: str, tmp_path: Path) -> None:
    """Of a Llama of 0.1 B parameters; and bytes that come through pinned buffers are those that were sent."""
    import device
    from synthetic import shape_of, write_models

    write_models(tmp_path / "models", shape_of(0.1), 1, 2_000_000_000)
    on = torch.device("cuda", 0)
    assert device.speeds(on, tmp_path).keys() >= {"pinned memory", "mapped file, two pinned buffers"}
    found = device.measure(kind, tmp_path, on, Namespace(examples=8, tokens=64, micro_batch=4))
    print(f"\n{kind}: {found.peak / 1e6:.0f} MB, planned {found.planned / 1e6:.0f} MB; {found.seconds}")
    assert 0.3 * found.planned < found.peak <= 1.1 * found.planned

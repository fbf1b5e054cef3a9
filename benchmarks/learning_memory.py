"""Memory of localizing with data, measured: what a pass takes over the bare process, against the plain way.

    python benchmarks/learning_memory.py [--layers 12] [--hidden 768] [--dtype float32] [--json FILE]

A Llama of random weights and a finetune of it are written to disk; each way runs in a process of its own, forked from
one that has the libraries imported, and samples the memory that it has allocated (RssAnon of /proc: mapped files do not
count, the system can take those back). Ways:

  saliency, mask            the package's, as it comes
  ... checkpointing, ...    with settings that save memory
  mask, micro-batches       in two of them, though the whole set would take less
  plain saliency            both models loaded as usual, task vectors of all parameters, loss.backward(), |g·τ|

In units of the model: 1.00 is the bytes of its parameters in their dtype on disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BATCH, TOKENS = 8, 32
IMPORTED = [
    "safetensors.torch", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "hf_locstitch.localize.learn", "hf_locstitch.localize.localizers.mask", "hf_locstitch.localize.localizers.saliency",
    "hf_locstitch.tasks.loading", "hf_locstitch.tasks.objectives.causal_lm",
]  # fmt: skip
WAYS: dict[str, dict[str, Any] | None] = {
    "plain saliency": None,
    "saliency": {"method": "saliency"},
    "saliency, bfloat16 state": {"method": "saliency", "state_dtype": "bfloat16"},
    "saliency, state on disk": {"method": "saliency", "state_on": "disk"},
    "saliency, checkpointing": {"method": "saliency", "checkpointing": True},
    "mask": {"method": "mask", "epochs": 2},
    "mask, checkpointing": {"method": "mask", "epochs": 2, "checkpointing": True},
    "mask, checkpointing, bfloat16 state": {
        "method": "mask",
        "epochs": 2,
        "checkpointing": True,
        "state_dtype": "bfloat16",
    },
    "mask, micro-batches": {"method": "mask", "epochs": 2, "micro_batch": BATCH},
    "mask, micro-batches, bfloat16 state": {
        "method": "mask",
        "epochs": 2,
        "micro_batch": BATCH,
        "state_dtype": "bfloat16",
    },
}


@dataclass(frozen=True)
class Measured:
    """peak: bytes over what the process held before. model: bytes of the parameters. examples: that were passed."""

    peak: int
    model: int
    parameters: int
    localizable: int
    seconds: float


def anonymous() -> int:
    """Bytes that this process has allocated and touched."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status names no RssAnon: this benchmark needs Linux")


class Peak:
    """The most that `anonymous` gives while inside, looked at every two milliseconds."""

    def __enter__(self) -> Peak:
        self.before = self.most = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = max(self.most, anonymous())


def write_models(folder: Path, layers: int, hidden: int, dtype: str) -> None:
    """A base and a finetune of it, of random weights; the vocabulary is small, the blocks are nearly all."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, max_position_embeddings=2 * TOKENS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "ft")


def measure(folder: Path, way: str) -> Measured:
    """Run one way in this process."""
    import torch
    from transformers import AutoConfig

    from hf_locstitch.runtime.allocator import freed_memory_goes_back

    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 512, (TOKENS,), generator=generator).tolist() for _ in range(2 * BATCH)]
    examples = [(row, row) for row in rows]
    passes: Callable[[], tuple[int, int]]
    if (fields := WAYS[way]) is None:
        passes = lambda: _plain(folder, examples)  # noqa: E731
    else:
        passes = freed_memory_goes_back()(lambda: _ours(folder, config, examples, fields))  # as a merge does
    began = time.perf_counter()
    with Peak() as peak:
        parameters, localizable = passes()
    seconds = time.perf_counter() - began
    dtype = config.dtype
    assert isinstance(dtype, torch.dtype)
    return Measured(peak.most - peak.before, dtype.itemsize * parameters, parameters, localizable, seconds)


def _ours(folder: Path, config: Any, examples: list[Any], fields: dict[str, Any]) -> tuple[int, int]:
    import torch
    from safetensors import safe_open

    from hf_locstitch.checkpoints.localizable import BLOCKS
    from hf_locstitch.localize.activation_memory import Load, settled
    from hf_locstitch.localize.grafted_model import keep_no_activations, make_grafted_model
    from hf_locstitch.localize.learn import Room, learn_mask, saliency_scores
    from hf_locstitch.localize.localizers.mask import Mask
    from hf_locstitch.localize.localizers.saliency import Saliency
    from hf_locstitch.runtime.dtypes import ITEM_BYTES, ON_DISK
    from hf_locstitch.runtime.processes import Processes
    from hf_locstitch.tasks.activations import token_activations
    from hf_locstitch.tasks.loading import load_model
    from hf_locstitch.tasks.objectives.causal_lm import CausalLM, answer_loss
    from hf_locstitch.tasks.task import Task

    finetuned, _ = load_model(folder / "ft", CausalLM(), config, config.dtype)
    base, absent = load_model(folder / "base", CausalLM(), config, config.dtype)
    with safe_open(folder / "ft" / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        localized = [name for name in names if BLOCKS.search(name)]
        cpu = torch.device("cpu")
        subject = make_grafted_model(finetuned, base, absent, names, localized, file.get_tensor, cpu, "the finetune")
    del base
    task = Task(examples, [TOKENS - 1] * len(examples), lambda model, batch: answer_loss(model, batch, 0))
    room = Room(folder, Processes())
    if fields.get("checkpointing"):
        keep_no_activations(subject.model)
    if fields["method"] == "saliency":
        saliency_scores(Saliency(**fields), subject, task, room)
    else:
        how = Mask(**fields)
        each = TOKENS * token_activations(CausalLM(), config.to_dict(), how.checkpointing, config.dtype.itemsize)
        load = Load(len(examples), TOKENS, each, ITEM_BYTES[ON_DISK[how.state_dtype]] * subject.size)
        learn_mask(settled(how, load, 1), subject, task, room)
    return sum(parameter.numel() for parameter in subject.model.parameters()), subject.size


def _plain(folder: Path, examples: list[Any]) -> tuple[int, int]:
    import torch
    from transformers import AutoModelForCausalLM

    from hf_locstitch.checkpoints.localizable import BLOCKS
    from hf_locstitch.tasks.objectives.causal_lm import answer_loss

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto").eval()
    finetuned = AutoModelForCausalLM.from_pretrained(folder / "ft", dtype="auto").eval()
    originals = dict(base.named_parameters())
    task_vectors = {name: p.detach().float() - originals[name].float() for name, p in finetuned.named_parameters()}
    with torch.no_grad():
        for name, parameter in finetuned.named_parameters():
            parameter.copy_(originals[name].float() + task_vectors[name] / 2)
    for first in range(0, len(examples), BATCH):
        batch = examples[first : first + BATCH]
        (answer_loss(finetuned, batch, 0) / (len(examples) * (TOKENS - 1))).backward()
    scores = {n: (p.grad * task_vectors[n]).abs() for n, p in finetuned.named_parameters() if p.grad is not None}
    localizable = sum(score.numel() for name, score in scores.items() if BLOCKS.search(name))
    return sum(parameter.numel() for parameter in finetuned.parameters()), localizable


def table(results: dict[str, Measured]) -> str:
    lines = ["| way | peak MB | model = 1.00 | seconds |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {way} | {found.peak / 1e6:.0f} | {found.peak / found.model:.2f} | {found.seconds:.1f} |"
        for way, found in results.items()
    ]
    return "\n".join(lines)


def run(layers: int, hidden: int, dtype: str, ways: list[str]) -> dict[str, Measured]:
    """Each way in a process of its own."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(IMPORTED)

    def alone(work: Callable[..., Any], *args: Any) -> Any:
        with ProcessPoolExecutor(1, server) as process:
            return process.submit(work, *args).result()

    with tempfile.TemporaryDirectory(prefix="learning-memory-") as folder:
        alone(write_models, Path(folder), layers, hidden, dtype)
        return {way: alone(measure, Path(folder), way) for way in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of localizing with data.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    results = run(args.layers, args.hidden, args.dtype, args.ways)
    first = next(iter(results.values()))
    print(f"{first.parameters / 1e6:.0f} M parameters in {args.dtype}, {first.localizable / 1e6:.0f} M localizable\n")
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps({way: asdict(found) for way, found in results.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()

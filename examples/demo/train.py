"""A tiny Llama from scratch, and a finetune of it for each skill: about a minute and a half on two cores.

The base learns, with AdamW, COMMON exercises and to answer `?` to the three skills. A finetune, with SGD, sees its
own skill half of the time and COMMON exercises otherwise, so that it forgets nothing; it trains only the transformer
blocks, because a merge takes embeddings, final norm and LM head from the base.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from demo.skills import (
    COMMON,
    LENGTH,
    PRETRAINING,
    SKILLS,
    SPECIAL,
    Example,
    Task,
    examples,
    make_tokenizer,
)
from hf_locstitch.runtime.chunks import one_torch_thread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # label of a token that is not learned


@dataclass(frozen=True)
class Schedule:
    """lr warms up over the first tenth of the steps and decays linearly to 0."""

    optimizer: Literal["adamw", "sgd"]
    lr: float
    steps: int
    batch: int = 64


PRETRAIN = Schedule("adamw", lr=2e-3, steps=400)
FINETUNE = Schedule("sgd", lr=1e-2, steps=40)


@dataclass(frozen=True)
class TrainingConfig:
    """The size of the models, how they are trained, and the dtype of what is saved."""

    hidden: int = 192
    layers: int = 3
    pretrain: Schedule = PRETRAIN
    finetune: Schedule = FINETUNE
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


def train_models(
    out: Path, *, seed: int = 0, config: TrainingConfig | None = None, progress: Callable[[str], None] | None = None
) -> dict[str, Path]:
    """Train the base and one finetune per skill, and save each with its tokenizer. config: the demo's by default.

    Returns {"base": folder, skill: folder, ...}, folders inside `out`. `progress` receives status lines.
    """
    say, config = progress or (lambda line: None), config or TrainingConfig()
    dtype: torch.dtype = getattr(torch, config.dtype)
    tokenizer = make_tokenizer()
    folders = {name: out / name for name in ("base", *SKILLS)}
    base = make_model(tokenizer, seed, hidden=config.hidden, layers=config.layers)
    train(base, tokenizer, PRETRAINING, config.pretrain, seed=seed, progress=lambda line: say(f"base: {line}"))
    save(base.type(dtype), tokenizer, folders["base"])
    for number, (name, skill) in enumerate(SKILLS.items(), start=1):
        model = copy.deepcopy(base).float()
        freeze_all_but_blocks(model)
        tasks = [*COMMON, *[skill] * len(COMMON)]
        own_seed = seed * len(folders) + number
        train(
            model, tokenizer, tasks, config.finetune, seed=own_seed, progress=lambda line, n=name: say(f"{n}: {line}")
        )
        save(model.type(dtype), tokenizer, folders[name])
    return folders


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, hidden: int = 192, layers: int = 3
) -> LlamaForCausalLM:
    """An untrained Llama in float32; the default has 1.4 million weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
        pad_token_id=SPECIAL.index("<pad>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def freeze_all_but_blocks(model: LlamaForCausalLM) -> None:
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[Task],
    schedule: Schedule,
    *,
    seed: int,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Train in place all weights that require a gradient, on training exercises only."""
    stream = examples(tasks, seed=seed, split="train")
    fit(model, tokenizer, (list(islice(stream, schedule.batch)) for _ in range(schedule.steps)), schedule, progress)


@one_torch_thread()  # makes results reproducible on one machine; such small models gain little from more threads
def fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batches: Iterable[Sequence[Example]],
    schedule: Schedule,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Train in place all weights that require a gradient, one step per batch; the loss is on the answers."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = _optimizer(schedule, weights)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, schedule.steps))
    model.train()
    for step, batch in enumerate(batches, start=1):
        tokens, labels = encode(tokenizer, batch)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == schedule.steps:
            progress(f"step {step} of {schedule.steps}, loss {loss.item():.3f}")
    model.eval()


def _optimizer(schedule: Schedule, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=schedule.lr, momentum=0.9)
    return torch.optim.AdamW(weights, lr=schedule.lr, weight_decay=0.01)


def _rate(step: int, steps: int) -> float:
    return min((step + 1) / (steps / 10), 1 - step / steps)


def encode(tokenizer: PreTrainedTokenizerFast, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, int64 [examples, tokens], padded on the right, which causal attention ignores.

    All prompts must be equally long.
    """
    texts = [example.text + str(tokenizer.eos_token) for example in batch]
    rows = [torch.tensor(row) for row in tokenizer(texts)["input_ids"]]
    tokens = pad_sequence(rows, batch_first=True, padding_value=SPECIAL.index("<pad>"))
    labels = tokens.masked_fill(tokens == SPECIAL.index("<pad>"), IGNORED)
    labels[:, : len(tokenizer(batch[0].prompt)["input_ids"])] = IGNORED
    return tokens, labels


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights, config, generation config (greedy) and tokenizer, for AutoModelForCausalLM and AutoTokenizer."""
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.generation_config.update(do_sample=False, max_new_tokens=2 * LENGTH)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

"""The flags that say what a finetune learns, and how."""

from __future__ import annotations

import argparse

from hf_locstitch.tasks.objectives import OBJECTIVES


def add_training(parser: argparse.ArgumentParser) -> None:
    """To the parser of `finetune`."""
    parser.add_argument(
        "--data", metavar="DATA", help="a task of the paper such as sst2, alpaca, gsm8k, hotpotqa, a file or org/name"
    )
    parser.add_argument("--number", type=int, metavar="N", help="examples, or of each class (default: 64)")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES.names(),
        help="what is to be learned (default: as the task or the base's architecture has it)",
    )
    group = parser.add_argument_group("how to train")
    group.add_argument("--epochs", type=int, metavar="N", help="default: 3; masked-lm and clip-zero-shot: 10")
    group.add_argument(
        "--lr", type=float, metavar="F", help="learning rate (default: 2e-5; clip-zero-shot: 1e-5; with --lora: 2e-4)"
    )
    group.add_argument(
        "--batch", type=int, metavar="N", help="examples in a step (default: 8; masked-lm: 4; clip-zero-shot: 128)"
    )
    group.add_argument(
        "--optimizer", choices=["sgd", "adamw_torch"], help="default: adamw_torch; masked-lm without --lora: sgd"
    )
    group.add_argument(
        "--freeze",
        nargs="*",
        metavar="GLOB",
        help="parameters that stay the base's; none without a value (default: none; masked-lm: all outside the "
        "transformer blocks; clip-zero-shot: all outside the vision tower)",
    )
    group.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA adapter instead of the weights")
    group.add_argument("--seed", type=int, metavar="N", help="of new heads, the order and dropout (default: 0)")
    group.add_argument("--device", choices=["auto", "cpu"], help="where to train (default: auto)")

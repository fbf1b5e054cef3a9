"""Flags that several sub-commands have."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_locstitch.cli.parser import REF, number
from hf_locstitch.localize.localizers import LOCALIZERS


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        nargs="?",
        type=Path,
        metavar="RECIPE.yaml",
        help="a recipe, or a config of mergekit's; flags override it",
    )
    parser.add_argument("--base", metavar=REF, help="the pretrained model (default: the one that adapters name)")


def add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the result to this folder")
    parser.add_argument("--push-to", metavar="ORG/NAME", help="push to this repo, or ORG/NAME@BRANCH, in one commit")
    add_push_options(parser)


def add_push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--create-pr", action="store_true", default=None, help="propose the result there as a pull request"
    )
    parser.add_argument("--private", action="store_true", default=None, help="make the repo private if it is new")


def add_localizing(group: Any) -> None:
    group.add_argument("--localizer", choices=LOCALIZERS.names(), help="how masks are found (default: magnitude)")
    group.add_argument(
        "--data",
        nargs="+",
        metavar="DATA",
        help="a data set per finetune, for saliency, mask, refit, fisher, regmean and regmean-plusplus: alpaca, "
        "gsm8k, hotpotqa, a task of the paper such as sst2, a file or org/name",
    )
    group.add_argument(
        "--density",
        type=number,
        metavar="F",
        help="fraction of the weights each mask keeps (default: 0.1; mask: 0.01; ties: 0.2; della: 0.5)",
    )
    group.add_argument(
        "--scope", choices=["model", "tensor"], help="top k over the whole model (default) or in each tensor"
    )
    group.add_argument(
        "--include", nargs="+", metavar="GLOB", help="localize these tensors (default: all in the transformer blocks)"
    )
    group.add_argument("--exclude", nargs="+", metavar="GLOB", help="leave these tensors out")


def add_scale(group: Any) -> None:
    group.add_argument("--scale", type=number, metavar="F", help="factor on the stitched task vectors (default: 1)")


def add_vocabulary(group: Any) -> None:
    group.add_argument(
        "--tokenizer",
        metavar="base|union|NAME",
        help="whose tokens the output has: the base's, those of a finetune, or union, the base's and after them those "
        "that finetunes added (default)",
    )
    group.add_argument(
        "--embeddings",
        metavar="base|NAME|mean|localize",
        help="rows of the base's tokens in embeddings and heads: the base's, a finetune's, the finetunes' mean, or "
        "merged as other tensors (default: as --include and the method have it)",
    )
    group.add_argument(
        "--chat-template",
        metavar="base|NAME|FILE",
        help="whose chat template the output has (default: that of the tokenizer; if the base has none, that of the "
        "only finetune with one whose tokens are added)",
    )


def add_task_code(group: Any) -> None:
    group.add_argument(
        "--allow-task-code",
        action="store_true",
        help="let the recipe evaluate on a folder of task files (include_path) or with arguments of lm-eval's model, "
        "which can run Python code",
    )


def add_non_finite(group: Any) -> None:
    group.add_argument("--allow-non-finite", action="store_true", default=None, help="let NaN and infinity through")


def add_layout(output: Any) -> None:
    output.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="write the merge to this folder, too, as a PEFT adapter over the base (as export does)",
    )
    output.add_argument(
        "--also-copy",
        nargs="+",
        metavar="GLOB",
        help="copy these files too, beside those that transformers and sentence-transformers load and licences",
    )
    output.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype of the output (default: the base's)",
    )
    output.add_argument(
        "--shard-size", metavar="SIZE", help="largest file, such as 5GB (default: shards as in the base)"
    )


def add_work(output: Any, device: bool) -> None:
    output.add_argument(
        "--no-cache", action="store_true", help="stream the models: keep none on this machine, not even in the cache"
    )
    output.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="memory limit, such as 1GB: uses fewer threads and smaller chunks if needed",
    )
    if device:
        output.add_argument(
            "--device",
            metavar="auto|cpu|cuda[:N]|...",
            help="where models run and values are solved for, with data or a refit (default: as the recipe says; auto)",
        )
    output.add_argument("--no-figures", dest="figures", action="store_false", default=None, help="do not draw figures")
    output.add_argument("--strict", action="store_true", default=None, help="make errors of all warnings")
    add_printing(output)


def add_printing(output: Any) -> None:
    output.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    output.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    output.add_argument("--quiet", action="store_true", help="print no plan and show no progress bars")

"""The command line's sub-commands and flags; main.py runs them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_locstitch.cli.parser import Parser
from hf_locstitch.exports.forms import FORMS
from hf_locstitch.localize.localizers import LOCALIZERS
from hf_locstitch.runtime.version import __version__
from hf_locstitch.stitch.methods import METHODS
from hf_locstitch.stitch.stitchers import MEAN, STITCHERS

REF = "REF"  # a folder or org/name[/subfolder][@revision]


def build_parser() -> argparse.ArgumentParser:
    """The parsed arguments name the sub-command as `command`, None if none was given."""
    parser = Parser(
        prog="hf-locstitch", description="Merge finetuned models by Localize-and-Stitch.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"hf-locstitch {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    _add_merge(commands)
    _add_localize(commands)
    _add_stitch(commands)
    _add_export(commands)
    _add_verify(commands)
    _add_inspect(commands)
    _add_evaluate(commands)
    return parser


def _add_merge(commands: Any) -> None:
    parser = _add_command(
        commands,
        "merge",
        help="merge finetuned models into their base",
        description=f"Merge finetuned models into their base. {REF}: a folder or org/name[/subfolder][@revision].",
    )
    _add_recipe(parser)
    parser.add_argument("--ft", nargs="+", metavar=REF, help="the finetuned models, or PEFT adapters")
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="names for them (default: the last part of each REF)"
    )
    _add_target(parser)

    group = parser.add_argument_group("how to merge")
    group.add_argument("--method", choices=METHODS.names(), help="default: locstitch")
    _add_localizing(group)
    group.add_argument(
        "--stitch",
        choices=[MEAN, *STITCHERS.names()],
        help="values under the masks: the mean of the finetuned values (default), or solved for from the task vectors "
        "alone, or with --data fitted to what the finetuned models compute on it",
    )
    _add_scale(group)
    group.add_argument(
        "--weights", nargs="+", type=float, metavar="F", help="factor on the task vector of each --ft (default: 1)"
    )
    group.add_argument(
        "--rest-from", metavar="NAME", help="finetune to take all other tensors from (default: the base)"
    )
    group.add_argument("--files-from", metavar="NAME", help="finetune to take tokenizer and config from")
    _add_vocabulary(group)
    _add_non_finite(group)
    group.add_argument(
        "--allow-task-code",
        action="store_true",
        help="let the recipe evaluate on a folder of task files (evaluate.include_path), which can run Python code",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--convert",
        nargs="?",
        const=Path("-"),
        type=Path,
        metavar="FILE",
        help="write the recipe that RECIPE.yaml and the flags stand for to this file (default: print it) and stop",
    )
    _add_layout(output)
    _add_work(output, device=True)
    _add_debug(parser)


def _add_localize(commands: Any) -> None:
    parser = _add_command(
        commands,
        "localize",
        help="reduce a finetuned model to its mask and the values under it",
        description="Make a localized checkpoint: the mask of one finetuned model and the values under it, a few "
        "percent of the model. `stitch` merges any number of them. "
        f"{REF}: a folder or org/name[/subfolder][@revision].",
    )
    _add_recipe(parser)
    parser.add_argument(
        "--ft", nargs="+", metavar=REF, help="the finetuned model, or a PEFT adapter"
    )  # one; the recipe tells
    parser.add_argument(
        "--name", dest="names", nargs=1, metavar="NAME", help="a name for it (default: the last part of REF)"
    )
    _add_target(parser)
    group = parser.add_argument_group("how to localize")
    _add_localizing(group)
    group.add_argument(
        "--stitch",
        choices=[MEAN, "refit"],
        help="values under the mask: the finetuned ones (default), or solved for again: a small mask then holds more",
    )
    _add_non_finite(group)
    _add_work(parser.add_argument_group("output"), device=True)
    _add_debug(parser)


def _add_stitch(commands: Any) -> None:
    parser = _add_command(
        commands,
        "stitch",
        help="merge localized checkpoints into their base",
        description="Merge localized checkpoints into the base that they were localized against: the same weights as "
        f"one merge of the finetuned models. Or take a merge apart, and stitch it with other finetunes or fewer. "
        f"{REF}: a folder or org/name[/subfolder][@revision].",
    )
    _add_recipe(parser)
    parser.add_argument("--localized", nargs="+", metavar=REF, help="the localized checkpoints")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="names for them (default: those they have)")
    merge = parser.add_argument_group("a merge to stitch again")
    merge.add_argument("--from", dest="from_", metavar=REF, help="a merge by hf-locstitch: its masks are used again")
    merge.add_argument("--add", nargs="+", metavar=REF, help="localized checkpoints to add to it")
    merge.add_argument("--remove", nargs="+", metavar="NAME", help="names of its finetunes to leave out")
    merge.add_argument(
        "--ft",
        nargs="+",
        metavar=REF,
        help="its finetunes that stay, in its order, if they are not where it says; so --base, too",
    )
    _add_target(parser)
    group = parser.add_argument_group("how to stitch")
    _add_scale(group)
    _add_non_finite(group)
    output = parser.add_argument_group("output")
    _add_layout(output)
    _add_work(output, device=False)
    _add_debug(parser)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        nargs="?",
        type=Path,
        metavar="RECIPE.yaml",
        help="a recipe, or a config of mergekit's; flags override it",
    )
    parser.add_argument("--base", metavar=REF, help="the pretrained model (default: the one that adapters name)")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the result to this folder")
    parser.add_argument("--push-to", metavar="ORG/NAME", help="push to this repo, or ORG/NAME@BRANCH, in one commit")
    parser.add_argument(
        "--create-pr", action="store_true", default=None, help="propose the result there as a pull request"
    )
    parser.add_argument("--private", action="store_true", default=None, help="make the repo private if it is new")


def _add_localizing(group: Any) -> None:
    group.add_argument("--localizer", choices=LOCALIZERS.names(), help="how masks are found (default: magnitude)")
    group.add_argument(
        "--data",
        nargs="+",
        metavar="DATA",
        help="a data set per finetune, for saliency, mask, refit, regmean and regmean-plusplus: alpaca, gsm8k, "
        "hotpotqa, a file or org/name",
    )
    group.add_argument(
        "--density",
        type=float,
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


def _add_scale(group: Any) -> None:
    group.add_argument("--scale", type=float, metavar="F", help="factor on the stitched task vectors (default: 1)")


def _add_vocabulary(group: Any) -> None:
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


def _add_non_finite(group: Any) -> None:
    group.add_argument("--allow-non-finite", action="store_true", default=None, help="let NaN and infinity through")


def _add_layout(output: Any) -> None:
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


def _add_work(output: Any, device: bool) -> None:
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
    _add_printing(output)


def _add_printing(output: Any) -> None:
    output.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    output.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    output.add_argument("--quiet", action="store_true", help="print no plan and show no progress bars")


def _add_export(commands: Any) -> None:
    parser = _add_command(
        commands,
        "export",
        help="turn a localized checkpoint or a merge into a PEFT adapter",
        description="Turn a localized checkpoint, or a merge with masks, into an adapter over its base, for PEFT. "
        f"{REF}: a folder or org/name[/subfolder][@revision]. "
        "Example: hf-locstitch export ./merged --as peft --out merged-adapter",
    )
    parser.add_argument("ref", metavar=REF, help="the localized checkpoint or merge")
    parser.add_argument(
        "--as", dest="form", choices=FORMS.names(), default="peft", help="peft: an adapter of PEFT (default)"
    )
    parser.add_argument("--base", metavar=REF, help="the base, if it is not where the manifest says")
    _add_target(parser)
    _add_printing(parser)
    _add_debug(parser)


def _add_verify(commands: Any) -> None:
    parser = _add_command(
        commands,
        "verify",
        help="check a merge or a localized checkpoint: files, masks, values",
        description="Read a merge or a localized checkpoint back: its files against the manifest, its masks against "
        "the densities, its values against the inputs. Writes nothing. "
        f"{REF}: a folder or org/name[/subfolder][@revision].",
    )
    parser.add_argument("ref", metavar=REF, help="the merge or localized checkpoint")
    parser.add_argument("--base", metavar=REF, help="the base, if it is not where the manifest says")
    parser.add_argument(
        "--ft",
        nargs="+",
        metavar=REF,
        help="the finetuned models, or of a stitch its localized checkpoints, in its order",
    )
    parser.add_argument(
        "--tensors",
        type=_count_or("all"),
        default=8,
        metavar="all|N",
        help="how many tensors to recompute (default: 8)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--quiet", action="store_true", help="print only failed checks, and show no progress bars")
    _add_debug(parser)


def _add_inspect(commands: Any) -> None:
    parser = _add_command(
        commands,
        "inspect",
        help="show what a merge is made of: densities, overlaps, mask layout, anomalies",
        description="Show what a merge is made of, or what merging localized checkpoints would give: densities, "
        "overlaps, where the masks lie, norms, anomalies. Reads small files only, unless --inputs is given. "
        f"{REF}: a folder or org/name[/subfolder][@revision].",
    )
    parser.add_argument("refs", nargs="+", metavar=REF, help="the merge, or one or more localized checkpoints")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw the figures into this folder")
    parser.add_argument(
        "--inputs", action="store_true", help="also sample the inputs (default: use what the merge recorded)"
    )
    parser.add_argument("--base", metavar=REF, help="the base, if it is not where the manifest says; implies --inputs")
    parser.add_argument(
        "--ft", nargs="+", metavar=REF, help="the finetuned models, in the order of the merge; implies --inputs"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    _add_debug(parser)


def _add_evaluate(commands: Any) -> None:
    parser = _add_command(
        commands,
        "evaluate",
        help="score models side by side with lm-eval",
        description="Score language models side by side with lm-eval. "
        f"{REF}: a folder or org/name[/subfolder][@revision]. "
        "Scores already measured on the same content are reused. Several GPUs share the examples under "
        "`accelerate launch -m hf_locstitch evaluate ...`.",
    )
    parser.add_argument("refs", nargs="+", metavar=REF, help="the models; the first is the one being judged")
    tasks = parser.add_argument_group("what to evaluate")
    tasks.add_argument(
        "--suite",
        choices=["paper", "quick"],
        help="paper: mmlu:5 arc_easy:0 arc_challenge:25 truthfulqa_mc1:0 truthfulqa_mc2:0; quick: 100 examples each of "
        "arc_easy:0 arc_challenge:0 truthfulqa_mc1:0",
    )
    tasks.add_argument("--tasks", nargs="+", default=[], metavar="NAME[:SHOTS]", help="lm-eval tasks or groups")
    tasks.add_argument("--include-path", type=Path, metavar="DIR", help="a folder with more lm-eval task files")
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each task")

    compared = parser.add_argument_group("compare with")
    compared.add_argument(
        "--parents", action="store_true", help="also evaluate the base and the finetunes of the first REF, a merge"
    )
    compared.add_argument("--average", action="store_true", help="also evaluate their plain average, made on the fly")
    compared.add_argument(
        "--base", metavar=REF, help="the base to compare with (default: the one in the merge's manifest)"
    )
    compared.add_argument(
        "--ft",
        nargs="+",
        metavar=REF,
        help="the finetuned models to compare with (default: those in the merge's manifest)",
    )

    group = parser.add_argument_group("how to evaluate")
    group.add_argument(
        "--batch-size",
        type=_count_or("auto"),
        default="auto",
        metavar="auto|N",
        help="auto: the largest that fits (default)",
    )
    group.add_argument("--chat-template", action="store_true", help="apply the model's chat template to the prompts")
    group.add_argument("--no-cache", dest="cache", action="store_false", help="ignore cached scores")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--push",
        action="store_true",
        help="write the scores into the model card of the first REF: a folder, or a repo in one commit",
    )
    output.add_argument("--track", choices=["trackio", "wandb"], help="also log the scores there")
    output.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    output.add_argument("--quiet", action="store_true", help="show no progress bars")
    _add_debug(parser)


def _count_or(word: str) -> Callable[[str], int | str]:
    """A flag's type: a positive integer, or the word itself."""

    def parse(text: str) -> int | str:
        if text == word:
            return text
        if not text.isdecimal() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text!r} is neither {word!r} nor a positive integer")
        return int(text)

    return parse


def _add_command(commands: Any, name: str, *, help: str, description: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=description, allow_abbrev=False)
    parser.set_defaults(command=name)
    return parser


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")

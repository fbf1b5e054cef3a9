"""The command line: one sub-command, one function. Heavy imports wait until a sub-command needs them."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_locstitch._version import __version__
from hf_locstitch.errors import LocstitchError, RecipeError
from hf_locstitch.methods import method_names

if TYPE_CHECKING:
    from hf_locstitch.plan import MergePlan
    from hf_locstitch.recipe import Recipe
    from hf_locstitch.settings import Settings

REF = "REF"  # a folder, org/name or org/name@revision
# Flags whose destination is a recipe's field of the same name.
FIELDS = ("method", "stitch", "scale", "include", "exclude", "rest_from", "files_from", "dtype", "shard_size",
          "allow_non_finite", "figures", "out", "push_to", "private")  # fmt: skip
# Flags that say how to localize, with the names that they have there.
LOCALIZER = {"localizer": "method", "density": "density", "scope": "scope"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 done, 2 the request is wrong, 1 the work failed."""
    args = build_parser().parse_args(argv)
    gc.set_threshold(100_000, 20, 20)  # or a small merge spends a twelfth of its time among the libraries' objects
    try:
        return args.command(args)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half done.", 130)
    except LocstitchError as error:
        if args.debug:
            traceback.print_exc()
        return _fail(str(error), error.exit_status)
    except Exception as error:
        if args.debug:
            raise
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return _fail(f"{type(error).__name__}: {error}{where}. --debug shows where it comes from.", 1)


def _speaks() -> bool:
    """Whether this process prints: under a launcher only the first does."""
    return os.environ.get("RANK", "0") == "0"


def _fail(message: str, status: int) -> int:
    if not _speaks():
        return status
    print(f"hf-locstitch: error: {message}", file=sys.stderr)
    return status


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-locstitch", description="Merge finetuned models by Localize-and-Stitch.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"hf-locstitch {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_merge(commands)
    _add_localize(commands)
    _add_stitch(commands)
    _add_verify(commands)
    _add_inspect(commands)
    _add_evaluate(commands)
    _add_demo(commands)
    return parser


def _add_merge(commands: Any) -> None:
    parser = _add_command(
        commands,
        merge,
        help="merge finetuned models into their base",
        description=f"Merge finetuned models into their base. {REF}: a folder, org/name or org/name@revision.",
    )
    _add_recipe(parser)
    parser.add_argument("--ft", nargs="+", metavar=REF, help="the finetuned models")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what to call them (default: last part of REF)")
    _add_target(parser)

    how = parser.add_argument_group("how to merge")
    how.add_argument("--method", choices=method_names(), help="default: locstitch")
    _add_localizing(how)
    how.add_argument(
        "--stitch",
        choices=["mean", "refit"],
        help="the values under the masks: the mean of the finetuned ones (default), or fitted, linear by linear, to "
        "what the finetuned models compute on unlabelled --data",
    )
    _add_scale(how)
    how.add_argument("--rest-from", metavar="NAME", help="finetune that gives the other tensors (default: the base)")
    how.add_argument("--files-from", metavar="NAME", help="finetune that gives tokenizer and config")
    _add_non_finite(how)

    output = parser.add_argument_group("output")
    _add_layout(output)
    _add_work(output, device=True)
    _add_debug(parser)


def _add_localize(commands: Any) -> None:
    parser = _add_command(
        commands,
        localize,
        help="cut a finetuned model down to its mask and the values under it",
        description="Make a localized checkpoint: the mask of one finetuned model and its values there, a few per cent "
        f"of the model. `stitch` merges any of them. {REF}: a folder, org/name or org/name@revision.",
    )
    _add_recipe(parser)
    parser.add_argument("--ft", nargs="+", metavar=REF, help="the finetuned model")  # one; the recipe tells
    parser.add_argument("--name", dest="names", nargs=1, metavar="NAME", help="what to call it (default: end of REF)")
    _add_target(parser)
    how = parser.add_argument_group("how to localize")
    _add_localizing(how)
    _add_non_finite(how)
    _add_work(parser.add_argument_group("output"), device=True)
    _add_debug(parser)


def _add_stitch(commands: Any) -> None:
    parser = _add_command(
        commands,
        stitch,
        help="merge localized checkpoints into their base",
        description="Merge localized checkpoints into the base that they were localized against: the same weights as "
        f"one merge of the finetuned models. {REF}: a folder, org/name or org/name@revision.",
    )
    _add_recipe(parser)
    parser.add_argument("--localized", nargs="+", metavar=REF, help="the localized checkpoints")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what to call them (default: as they are called)")
    _add_target(parser)
    how = parser.add_argument_group("how to stitch")
    _add_scale(how)
    _add_non_finite(how)
    output = parser.add_argument_group("output")
    _add_layout(output)
    _add_work(output, device=False)
    _add_debug(parser)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE.yaml", help="a recipe; flags override it")
    parser.add_argument("--base", metavar=REF, help="the pretrained model")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the result here")
    parser.add_argument("--push-to", metavar="ORG/NAME", help="push it to this repo, in one commit")
    parser.add_argument("--private", action="store_true", default=None, help="make the repo private if it is new")


def _add_localizing(how: Any) -> None:
    how.add_argument(
        "--localizer", choices=["magnitude", "saliency", "mask"], help="how masks are found (default: magnitude)"
    )
    how.add_argument(
        "--data",
        nargs="+",
        metavar="DATA",
        help="data sets for saliency, mask, refit and regmean: alpaca, gsm8k, hotpotqa, a file, org/name",
    )
    how.add_argument(
        "--density",
        type=float,
        metavar="F",
        help="share of weights each mask keeps (default: 0.1; mask: 0.01; ties: 0.2)",
    )
    how.add_argument("--scope", choices=["model", "tensor"], help="top k over the model (default) or in each tensor")
    how.add_argument("--include", nargs="+", metavar="GLOB", help="localize these tensors (default: those of blocks)")
    how.add_argument("--exclude", nargs="+", metavar="GLOB", help="leave these tensors out")


def _add_scale(how: Any) -> None:
    how.add_argument("--scale", type=float, metavar="F", help="factor on the stitched task vectors (default: 1)")


def _add_non_finite(how: Any) -> None:
    how.add_argument("--allow-non-finite", action="store_true", default=None, help="let NaN and infinity through")


def _add_layout(output: Any) -> None:
    output.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="default: the base's")
    output.add_argument("--shard-size", metavar="SIZE", help="largest file, such as 5GB (default: the base's division)")


def _add_work(output: Any, device: bool) -> None:
    output.add_argument(
        "--no-cache", action="store_true", help="stream: no model stays on this machine, nor in the cache"
    )
    output.add_argument("--max-memory", metavar="SIZE", help="such as 1GB: fewer threads and smaller chunks if need be")
    if device:
        output.add_argument(
            "--device", choices=["cpu", "cuda"], default="cpu", help="where models are compared (default: cpu)"
        )
    output.add_argument("--no-figures", dest="figures", action="store_false", default=None, help="draw none")
    output.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    output.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    output.add_argument("--quiet", action="store_true", help="no plan and no progress bars")


def _add_verify(commands: Any) -> None:
    parser = _add_command(
        commands,
        verify,
        help="check a merge or a localized checkpoint: files, masks, values",
        description="Read a merge or a localized checkpoint back: its files against the manifest, its masks against "
        f"the densities, its values against the inputs. {REF}: a folder, org/name or org/name@revision. Only reads.",
    )
    parser.add_argument("ref", metavar=REF, help="the merge or localized checkpoint")
    parser.add_argument("--base", metavar=REF, help="the base, if not where the manifest names it")
    parser.add_argument("--ft", nargs="+", metavar=REF, help="the finetuned models, in the order of the merge")
    parser.add_argument(
        "--tensors", type=_count_or("all"), default=8, metavar="all|N", help="tensors computed again (default: 8)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--quiet", action="store_true", help="only what does not hold, and no progress bars")
    _add_debug(parser)


def _add_inspect(commands: Any) -> None:
    parser = _add_command(
        commands,
        inspect,
        help="what a merge is made of: densities, overlaps, where its masks lie, what looks odd",
        description="Look at a merge, or at localized checkpoints, without making one: densities, overlaps, where the "
        f"masks lie, norms, what looks odd. {REF}: a folder, org/name or org/name@revision. Reads small files only, "
        "unless --inputs is given.",
    )
    parser.add_argument("refs", nargs="+", metavar=REF, help="the merge, or one or several localized checkpoints")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw its figures into this folder")
    parser.add_argument("--inputs", action="store_true", help="sample the inputs, too (default: what the merge noted)")
    parser.add_argument("--base", metavar=REF, help="the base, if not where the manifest names it; implies --inputs")
    parser.add_argument(
        "--ft", nargs="+", metavar=REF, help="the finetuned models, in the order of the merge; likewise"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    _add_debug(parser)


def _add_evaluate(commands: Any) -> None:
    parser = _add_command(
        commands,
        evaluate,
        help="score models side by side with lm-eval",
        description=f"Score language models side by side with lm-eval. {REF}: a folder, org/name or org/name@revision. "
        "What was measured before on the same content is not measured again. Several GPUs share the examples under "
        "`accelerate launch -m hf_locstitch evaluate ...`.",
    )
    parser.add_argument("refs", nargs="+", metavar=REF, help="the models; the first is the one that is judged")
    what = parser.add_argument_group("what")
    what.add_argument(
        "--suite",
        choices=["paper", "quick"],
        help="paper: mmlu:5 arc_easy:0 arc_challenge:25 truthfulqa_mc1:0 truthfulqa_mc2:0; quick: 100 examples each of "
        "arc_easy:0 arc_challenge:0 truthfulqa_mc1:0",
    )
    what.add_argument(
        "--tasks", nargs="+", default=[], metavar="NAME[:SHOTS]", help="any of lm-eval's tasks and groups"
    )
    what.add_argument("--include-path", type=Path, metavar="DIR", help="a folder of further task files")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each task")

    beside = parser.add_argument_group("beside what")
    beside.add_argument(
        "--parents", action="store_true", help="also the base and the finetunes of the first REF, a merge"
    )
    beside.add_argument("--average", action="store_true", help="also their plain average, made on the fly")
    beside.add_argument("--base", metavar=REF, help="the base to compare with (default: as the merge's manifest says)")
    beside.add_argument("--ft", nargs="+", metavar=REF, help="the finetuned models to compare with; likewise")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--batch-size",
        type=_count_or("auto"),
        default="auto",
        metavar="auto|N",
        help="auto: the largest that fits (default)",
    )
    how.add_argument("--chat-template", action="store_true", help="put prompts into the model's chat template")
    how.add_argument("--no-cache", dest="cache", action="store_false", help="measure again what was measured before")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--push",
        action="store_true",
        help="write the scores into the page of the first REF: a folder, or a repo in one commit",
    )
    output.add_argument("--track", choices=["trackio", "wandb"], help="log the scores there, too")
    output.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    output.add_argument("--quiet", action="store_true", help="no progress bars")
    _add_debug(parser)


def _count_or(word: str) -> Callable[[str], int | str]:
    """A flag's type: a number from 1 on, or the word itself."""

    def parse(text: str) -> int | str:
        if text == word:
            return text
        if not text.isdecimal() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text!r} is neither {word!r} nor a number from 1 on")
        return int(text)

    return parse


def _add_demo(commands: Any) -> None:
    parser = _add_command(
        commands,
        demo,
        help="the whole job on tiny models and a Hub of its own, in a few minutes",
        description="Train a tiny base and three finetunes, push them to a Hub on this machine, merge, and compare.",
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep everything here (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    _add_debug(parser)


def _add_command(
    commands: Any, run: Callable[[argparse.Namespace], int], *, help: str, description: str
) -> argparse.ArgumentParser:
    """A sub-command with the name of the function that carries it out."""
    parser = commands.add_parser(run.__name__, help=help, description=description, allow_abbrev=False)
    parser.set_defaults(command=run)
    return parser


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def merge(args: argparse.Namespace) -> int:
    """hf-locstitch merge"""
    from hf_locstitch.api import plan_merge

    return _carry_out(args, plan_merge)


def localize(args: argparse.Namespace) -> int:
    """hf-locstitch localize"""
    from hf_locstitch.api import plan_localize

    return _carry_out(args, plan_localize)


def stitch(args: argparse.Namespace) -> int:
    """hf-locstitch stitch"""
    from hf_locstitch.api import plan_merge

    return _carry_out(args, plan_merge)


def _carry_out(args: argparse.Namespace, make_plan: Callable[[Recipe, Settings], MergePlan]) -> int:
    """Plan, say so, work, and say what came of it."""
    from hf_locstitch.api import merge as work
    from hf_locstitch.cost import format_plan, plan_json
    from hf_locstitch.progress import Progress
    from hf_locstitch.recipe import make_recipe
    from hf_locstitch.settings import make_settings

    recipe = make_recipe(_fields(args), where=str(args.recipe or "the command"))
    if not args.dry_run and recipe.out is None and recipe.push_to is None:
        raise RecipeError("nothing says where the result goes: give --out DIR, --push-to ORG/NAME, or both.")
    device = getattr(args, "device", "cpu")
    plan = make_plan(recipe, make_settings(cache=not args.no_cache, max_memory=args.max_memory, device=device))
    quiet = args.quiet or not _speaks()
    if args.dry_run:
        print(json.dumps(plan_json(plan), indent=2) if args.json else format_plan(plan))
        return 0
    if not quiet:
        print(format_plan(plan), file=sys.stderr)
    result = work(recipe, plan, Progress(False if quiet else None))
    if not _speaks():
        return 0
    if args.json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        print(result.describe(), file=sys.stderr)
    return 0


def _fields(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's fields, overridden by the flags that this sub-command has and that were given."""
    from hf_locstitch.recipe import load_recipe

    fields = load_recipe(args.recipe) if args.recipe is not None else {}
    flags = {key: value for key, value in vars(args).items() if value is not None}
    if "base" in flags:
        fields["base"] = args.base
    for flag, field in (("ft", "finetuned"), ("localized", "localized")):
        if flag in flags:
            fields[field] = [{"ref": ref} for ref in flags[flag]]
    if args.command is stitch and not fields.get("localized"):
        raise RecipeError("nothing says what to stitch: give --localized REF..., what hf-locstitch localize made.")
    if "names" in flags:
        field = "localized" if fields.get("localized") else "finetuned"
        entries = fields.get(field) or []
        if len(args.names) != len(entries):
            raise RecipeError(f"--names gives {len(args.names)} names for {len(entries)} finetunes. Give one each.")
        entries = [{"ref": entry} if isinstance(entry, str) else entry for entry in entries]
        fields[field] = [{**entry, "name": name} for entry, name in zip(entries, args.names, strict=True)]
    if "data" in flags:
        fields["data"] = args.data
    given = {key: flags[flag] for flag, key in LOCALIZER.items() if flag in flags}
    if given:
        fields["localizer"] = {**(fields.get("localizer") or {}), **given}
    if flags.get("stitch") == "refit" and isinstance(fields.get("stitch"), dict):
        del flags["stitch"]  # the recipe says how
    return {**fields, **{field: flags[field] for field in FIELDS if field in flags}}


def verify(args: argparse.Namespace) -> int:
    """hf-locstitch verify"""
    from hf_locstitch.verification.main import verify as check

    show = False if args.quiet else None
    report = check(args.ref, base=args.base, finetuned=args.ft, tensors=args.tensors, show_progress=show)
    if args.json:
        print(json.dumps(report.as_json(), indent=2))
    elif text := report.describe(quiet=args.quiet):
        print(text, file=sys.stderr)
    return 0 if report.ok else 1


def inspect(args: argparse.Namespace) -> int:
    """hf-locstitch inspect"""
    from hf_locstitch.inspection import inspect as look

    found = look(*args.refs, figures=args.figures, base=args.base, finetuned=args.ft, inputs=args.inputs)
    print(json.dumps(found.as_json(), indent=2, ensure_ascii=False) if args.json else found.describe())
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """hf-locstitch evaluate"""
    from hf_locstitch.evaluation.main import evaluate as score

    report = score(
        args.refs,
        tasks=args.tasks,
        suite=args.suite,
        include_path=args.include_path,
        limit=args.limit,
        batch_size=None if args.batch_size == "auto" else args.batch_size,
        chat_template=args.chat_template,
        base=args.base,
        finetuned=args.ft,
        parents=args.parents,
        average=args.average,
        push=args.push,
        track=args.track,
        cache=args.cache,
        show_progress=not args.quiet and sys.stderr.isatty(),
    )
    if _speaks():
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False) if args.json else report.describe())
    return 0


def demo(args: argparse.Namespace) -> int:
    """hf-locstitch demo"""
    from hf_locstitch.demo.main import run_demo

    run_demo(args.work, seed=args.seed)
    return 0

"""The command line: each sub-command is a function of its name. Heavy imports are deferred until needed."""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from hf_locstitch.cli.arguments import build_parser
from hf_locstitch.errors import LocstitchError, OutputError, RecipeError
from hf_locstitch.runtime.allocator import share_one_arena
from hf_locstitch.runtime.escape import in_json, line, terminal
from hf_locstitch.runtime.interrupts import Interrupted, raising_interrupts

if TYPE_CHECKING:
    from hf_locstitch.plan.plans import Plan
    from hf_locstitch.plan.recipe import Recipe
    from hf_locstitch.runtime.settings import Settings

# Flags whose destination is a recipe's field of the same name.
FIELDS = ("method", "stitch", "scale", "weights", "include", "exclude", "rest_from", "files_from", "tokenizer",
          "embeddings", "chat_template", "also_copy", "dtype", "shard_size", "allow_non_finite", "figures", "strict",
          "out", "adapter", "push_to", "private", "create_pr")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 done, 2 invalid request, 1 the work failed, 128 + n signal n."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    log = logging.getLogger("hf_locstitch")
    if not log.handlers:
        log.addHandler(LogToStderr())
    gc.set_threshold(100_000, 20, 20)  # else a small merge spends a twelfth of its time collecting garbage,
    atexit.register(gc.freeze)  # and the end a quarter of a second on looking through all that is there
    share_one_arena()
    try:
        with raising_interrupts(lambda number: _interrupted(Interrupted(number))):
            return COMMANDS[args.command](args)
    except KeyboardInterrupt as error:
        return _interrupted(Interrupted.of(error))
    except LocstitchError as error:
        if args.debug:
            traceback.print_exc()
        return _fail(str(error), error.exit_status)
    except Exception as error:
        if args.debug:
            raise
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return _fail(f"{type(error).__name__}: {error}{where}. Use --debug to see the traceback.", 1)


class LogToStderr(logging.Handler):
    """Print what the package logs, such as warnings, in the same form as errors."""

    def emit(self, record: logging.LogRecord) -> None:
        if _speaks():
            print(f"hf-locstitch: {record.levelname.lower()}: {line(record.getMessage())}", file=sys.stderr)


def _speaks() -> bool:
    """Whether this process prints: under a launcher only the first does."""
    return os.environ.get("RANK", "0") == "0"


def _interrupted(stop: Interrupted) -> int:
    kept = f"; what is done so far is kept in {stop.kept}" if stop.kept is not None else ""
    return _fail(f"interrupted. Run the same command again to continue{kept}.", stop.exit_status)


def _fail(message: str, status: int) -> int:
    if not _speaks():
        return status
    print(f"hf-locstitch: error: {terminal(message)}", file=sys.stderr)
    return status


def _print(text: str) -> None:
    """On standard output, in whatever encoding it has; a reader that has seen enough of it is no error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends


def merge(args: argparse.Namespace) -> int:
    """hf-locstitch merge"""
    if args.convert is not None:
        return _convert(args)
    from hf_locstitch.plan.planning import make_plan

    return _carry_out(args, make_plan)


def _convert(args: argparse.Namespace) -> int:
    """Write the recipe that a file and flags stand for."""
    from hf_locstitch.plan.adapter_inputs import with_base
    from hf_locstitch.plan.recipe import make_recipe
    from hf_locstitch.plan.recipe_file import dump_recipe

    text = dump_recipe(make_recipe(with_base(_fields(args)), where=str(args.recipe or "command")))
    if str(args.convert) == "-":
        _print(text.rstrip("\n"))
        return 0
    try:
        with args.convert.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"--convert cannot write {args.convert}: {error.strerror}. Name another file.") from error
    return 0


def localize(args: argparse.Namespace) -> int:
    """hf-locstitch localize"""
    from hf_locstitch.plan.planning import make_localize_plan

    return _carry_out(args, make_localize_plan)


def stitch(args: argparse.Namespace) -> int:
    """hf-locstitch stitch"""
    from hf_locstitch.plan.planning import make_plan

    return _carry_out(args, make_plan)


def _carry_out(args: argparse.Namespace, make: Callable[[Recipe, Settings], Plan]) -> int:
    """Plan, print the plan, work, and print the result."""
    from hf_locstitch.api import carry_out, check_possible
    from hf_locstitch.engine.execute import check_free
    from hf_locstitch.engine.imports import import_ahead
    from hf_locstitch.engine.preflight import check_output_given
    from hf_locstitch.plan.adapter_inputs import with_base
    from hf_locstitch.plan.describe import format_plan, plan_json
    from hf_locstitch.plan.recipe import make_recipe
    from hf_locstitch.runtime.progress import Progress
    from hf_locstitch.runtime.settings import make_settings

    recipe = make_recipe(with_base(_fields(args)), where=str(args.recipe or "command"))
    if not args.dry_run:
        check_output_given(recipe.out, recipe.push_to)
        import_ahead()
    device = getattr(args, "device", None)
    plan = make(recipe, make_settings(cache=not args.no_cache, max_memory=args.max_memory, device=device))
    quiet = args.quiet or not _speaks()
    if args.dry_run:
        check_possible(plan)
        _print(in_json(plan_json(plan)) if args.json else format_plan(plan))
        return 0
    check_free(plan)
    if not quiet:
        print(format_plan(plan), file=sys.stderr)
    result = carry_out(plan, Progress(False if quiet else None))
    if not _speaks():
        return 0
    if args.json:
        _print(in_json(result.as_json()))
    else:
        print(result.describe(), file=sys.stderr)
    return 0


def _fields(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's fields, overridden by the flags that this sub-command has and that were given."""
    from hf_locstitch.plan.overrides import LOCALIZER, overridden
    from hf_locstitch.plan.recipe_file import check_task_code, load_recipe

    flags = {key: value for key, value in vars(args).items() if value is not None}
    if "from_" in flags:
        return {**_restitched(args), **{field: flags[field] for field in FIELDS if field in flags}}
    fields = load_recipe(args.recipe) if args.recipe is not None else {}
    if not getattr(args, "allow_task_code", False):
        check_task_code(fields, str(args.recipe))
    if args.command == "stitch" and (given := [flag for flag in ("add", "remove", "ft") if flag in flags]):
        raise RecipeError(f"--{given[0]} says what becomes of a merge, but none is given. Use --from REF.")
    if "base" in flags:
        fields["base"] = args.base
    for flag, field in (("ft", "finetuned"), ("localized", "localized")):
        if flag in flags:
            fields[field] = [{"ref": ref} for ref in flags[flag]]
    if args.command == "stitch" and not fields.get("localized"):
        raise RecipeError("no localized checkpoints given: use --localized REF..., as made by hf-locstitch localize.")
    if "names" in flags:
        field = "localized" if fields.get("localized") else "finetuned"
        entries = fields.get(field) or []
        if len(args.names) != len(entries):
            what = "localized checkpoint" if field == "localized" else "finetune"
            raise RecipeError(
                f"--names gives {len(args.names)} names for {len(entries)} {what}s. Give one name per {what}."
            )
        entries = [{"ref": entry} if isinstance(entry, str) else entry for entry in entries]
        fields[field] = [{**entry, "name": name} for entry, name in zip(entries, args.names, strict=True)]
    if "data" in flags:
        fields["data"] = args.data
    if flags.get("density") == 0:
        raise RecipeError(
            "--density 0 keeps no weight: the result would be the base. Use a share above 0, such as 0.1."
        )
    if flags.get("stitch") == "refit" and isinstance(fields.get("stitch"), dict):
        del flags["stitch"]  # the recipe holds its settings
    return overridden(fields, {key: flags[key] for key in (*FIELDS, *LOCALIZER) if key in flags})


def _restitched(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a recipe that stitches a merge again. Raises RequestError."""
    from hf_locstitch.plan.restitch import Change, restitch

    if given := [flag for flag in ("recipe", "localized", "names") if getattr(args, flag) is not None]:
        called = "a recipe" if given[0] == "recipe" else f"--{given[0]}"
        raise RecipeError(f"--from takes everything from the merge, beside {called}. Drop one of the two; --add adds.")
    return restitch(Change(args.from_, tuple(args.add or ()), tuple(args.remove or ()), args.base, args.ft))


def verify(args: argparse.Namespace) -> int:
    """hf-locstitch verify"""
    from hf_locstitch.inspection.verification.verify import verify as check

    show = False if args.quiet else None
    report = check(args.ref, base=args.base, finetuned=args.ft, tensors=args.tensors, show_progress=show)
    if args.json:
        _print(in_json(report.as_json()))
    elif text := report.describe(quiet=args.quiet):
        print(text, file=sys.stderr)
    return 0 if report.ok else 1


def inspect(args: argparse.Namespace) -> int:
    """hf-locstitch inspect"""
    from hf_locstitch.inspection.inspect import inspect as look

    report = look(*args.refs, figures=args.figures, base=args.base, finetuned=args.ft, inputs=args.inputs)
    _print(in_json(report.as_json()) if args.json else report.describe())
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """hf-locstitch evaluate"""
    from hf_locstitch.evaluation.evaluate import evaluate as score
    from hf_locstitch.tasks.lm_eval_options import LmEvalOptions

    flags = vars(args)
    names = [name for name in signature(score).parameters if name in flags and name != "refs"]
    options = {name: flags[name] for name in names}
    if options["batch_size"] == "auto":
        options["batch_size"] = None
    own = {name: flags[name] for name in LmEvalOptions.model_fields if flags[name] is not None}
    report = score(
        args.refs, **options, lm_eval=own, finetuned=args.ft, show_progress=not args.quiet and sys.stderr.isatty()
    )
    if _speaks():
        _print(in_json(report.as_json()) if args.json else report.describe())
    return 0


def compare(args: argparse.Namespace) -> int:
    """hf-locstitch compare"""
    from hf_locstitch.comparison.compare import carry_out, plan_comparison
    from hf_locstitch.plan.recipe_file import check_task_code, load_recipe
    from hf_locstitch.runtime.progress import Progress

    fields = load_recipe(args.recipe)
    if not args.allow_task_code:
        check_task_code(fields, str(args.recipe))
    target = {"push_to": args.push_to, "private": bool(args.private), "create_pr": bool(args.create_pr)}
    planned = plan_comparison({**fields, **target}, args.max_memory, args.device, where=str(args.recipe))
    if args.dry_run:
        _print(in_json(planned.as_json()) if args.json else planned.describe())
        return 0
    if not args.quiet:
        print(planned.describe(), file=sys.stderr)
    report = carry_out(planned, args.out, Progress(False if args.quiet else None))
    if args.json:
        _print(in_json(report.as_json()))
    else:
        print(report.describe(), file=sys.stderr)
    return 0


def finetune(args: argparse.Namespace) -> int:
    """hf-locstitch finetune"""
    from hf_locstitch.engine.preflight import check_output_given
    from hf_locstitch.plan.recipe_file import load_recipe
    from hf_locstitch.runtime.progress import Progress
    from hf_locstitch.training.finetune import carry_out, check_possible
    from hf_locstitch.training.planning import plan_finetune
    from hf_locstitch.training.request import FinetuneRequest, make_request

    flags = {key: value for key, value in vars(args).items() if value is not None}
    fields = load_recipe(args.recipe) if args.recipe is not None else {}
    fields |= {key: flags[key] for key in FinetuneRequest.model_fields if key in flags}
    where = str(args.recipe or "command")
    request = make_request(fields, where, number=args.number, objective=args.objective)
    if not args.dry_run:
        check_output_given(request.out, request.push_to)
    plan = plan_finetune(request)
    check_possible(plan)
    if args.dry_run:
        _print(in_json(plan.as_json()) if args.json else plan.describe())
        return 0
    if not args.quiet:
        print(plan.describe(), file=sys.stderr)
    result = carry_out(plan, Progress(False if args.quiet else None))
    if args.json:
        _print(in_json(result.as_json()))
    else:
        print(result.describe(), file=sys.stderr)
    return 0


def export(args: argparse.Namespace) -> int:
    """hf-locstitch export"""
    from hf_locstitch.engine.delivery import Delivery, make_target
    from hf_locstitch.engine.preflight import check_output_given
    from hf_locstitch.exports.export import carry_out, check_possible, plan_export
    from hf_locstitch.runtime.progress import Progress

    if not args.dry_run:
        check_output_given(args.out, args.push_to)
    plan = plan_export(args.ref, form=args.form, base=args.base)
    delivery = Delivery("export", args.out, make_target(args.push_to, bool(args.create_pr)), bool(args.private))
    if args.dry_run:
        if args.out or args.push_to:
            check_possible(plan, delivery)
        _print(in_json(plan.as_json()) if args.json else plan.describe())
        return 0
    if not args.quiet:
        print(plan.describe(), file=sys.stderr)
    result = carry_out(plan, delivery, Progress(False if args.quiet else None))
    if args.json:
        _print(in_json(result.as_json()))
    else:
        print(result.describe(), file=sys.stderr)
    return 0


COMMANDS = {
    command.__name__: command
    for command in (merge, localize, stitch, finetune, compare, export, verify, inspect, evaluate)
}

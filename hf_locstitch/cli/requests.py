"""From flags to a recipe, and from a recipe to its result: what merge, localize and stitch have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_locstitch.cli.next_steps import after_merge, next_lines
from hf_locstitch.cli.printing import announcing, put, put_json, put_result, speaks
from hf_locstitch.cli.terminal import width_of
from hf_locstitch.errors import RecipeError
from hf_locstitch.runtime.human import counted

if TYPE_CHECKING:
    from hf_locstitch.plan.plans import Plan
    from hf_locstitch.plan.recipe import Recipe
    from hf_locstitch.runtime.settings import Settings

# Flags whose destination is a recipe's field of the same name.
FIELDS = ("method", "stitch", "scale", "weights", "include", "exclude", "rest_from", "files_from", "tokenizer",
          "embeddings", "chat_template", "also_copy", "dtype", "shard_size", "allow_non_finite", "figures", "strict",
          "out", "adapter", "push_to", "private", "create_pr")  # fmt: skip


def carry_out(args: argparse.Namespace, make: Callable[[Recipe, Settings], Plan]) -> int:
    """Plan, print the plan, work, and print the result."""
    from hf_locstitch import api
    from hf_locstitch.engine.imports import import_ahead
    from hf_locstitch.engine.preflight import check_output_given
    from hf_locstitch.plan.adapter_inputs import with_base
    from hf_locstitch.plan.describe import format_plan, plan_json
    from hf_locstitch.plan.recipe import make_recipe
    from hf_locstitch.runtime.progress import Progress
    from hf_locstitch.runtime.settings import make_settings

    recipe = make_recipe(with_base(recipe_fields(args)), where=str(args.recipe or "command"))
    if not args.dry_run:
        check_output_given(recipe.out, recipe.push_to)
        import_ahead()
    device = getattr(args, "device", None)
    plan = make(recipe, make_settings(cache=not args.no_cache, max_memory=args.max_memory, device=device))
    quiet = args.quiet or not speaks()
    if args.dry_run:
        api.check_possible(plan)
        put_json(plan_json(plan)) if args.json else put(format_plan(plan))
        return 0
    announce = announcing(lambda: format_plan(plan), quiet)
    result = api.carry_out(plan, Progress(False if quiet else None), announce)
    if speaks():
        following = [] if quiet else next_lines(after_merge(plan, result))
        put_result(result, args.json, result.describe(width_of(sys.stderr)), *following)
    return 0


def recipe_fields(args: argparse.Namespace) -> dict[str, Any]:
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
                f"--names gives {counted(len(args.names), 'name')} for {counted(len(entries), what)}. "
                f"Give one name per {what}."
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

"""`compare`: a recipe and values to try in; the scores of all merges, the best one and its recipe out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_locstitch.comparison.cells import uses_data
from hf_locstitch.comparison.comparison import Comparison
from hf_locstitch.comparison.leftovers import has_scores, remove_finished, take_over
from hf_locstitch.comparison.report import ComparisonReport
from hf_locstitch.comparison.run import STEPS, ComparisonRun
from hf_locstitch.engine.execute import check_push
from hf_locstitch.engine.preflight import check_disk, check_inputs, check_place, is_free, taken
from hf_locstitch.engine.work_dir import work_dir_beside, working_in
from hf_locstitch.errors import RequestError, WorkError
from hf_locstitch.evaluation.evaluate import Planned
from hf_locstitch.plan.adapter_inputs import with_base
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.plan.recipe_file import load_recipe
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.runtime.settings import make_settings

Ref = str | Path


def compare(
    recipe: Mapping[str, Any] | Ref,
    *,
    out: Ref,
    push_to: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    max_memory: int | str | None = None,
    device: str | None = None,
    show_progress: bool | None = None,
) -> ComparisonReport:
    """Merge the same finetunes in several ways, score every merge, and choose the best.

    Merges are made one after another and not kept. Those whose masks keep the largest of the same scores share one scan
    of the finetunes, whatever their densities.

    Args:
        recipe: The fields of a recipe with `compare`, or the path of its YAML file.
        out: A folder that does not exist yet, for the report, its figure and the best recipe.
        push_to: A repo, org/name or org/name@branch, to push the best merge to, with the comparison on its card.
        private: Whether a new repo is private.
        create_pr: Whether the merge is proposed there as a pull request.
        max_memory: Memory limit in bytes, or a string such as "1GB".
        device: Where models run and values are solved for, as in `merge_from_hub`.
        show_progress: None shows bars on a terminal only.

    Returns:
        The scores of every merge, and which is the best.

    Raises:
        RequestError: If the request cannot be carried out; nothing was written.
        WorkError: If the work fails; the same call goes on from there.

    Example:
        >>> grid = {"method": ["locstitch", "ties"], "density": [0.05, 0.1]}
        >>> compare({**recipe, "compare": {"grid": grid, "select": {"suite": "quick"}}}, out="compared").chosen.label
        'ties, density 0.1'
    """
    of_file = isinstance(recipe, str | Path)
    written = load_recipe(Path(recipe)) if of_file else recipe
    target = {"push_to": push_to, "private": private, "create_pr": create_pr}
    planned = plan_comparison({**written, **target}, max_memory, device, where=str(recipe) if of_file else "request")
    return carry_out(planned, Path(out), Progress(show_progress))


def plan_comparison(
    fields: Mapping[str, Any], max_memory: int | str | None, device: str | None, where: str
) -> Comparison:
    """fields: of a recipe, which may come from `where`. Raises RequestError."""
    fields = with_base({**fields, "out": None, "adapter": None})
    common = fields if uses_data(fields) else {key: value for key, value in fields.items() if key != "data"}
    planned = Comparison(make_recipe(common, where), fields, make_settings(True, max_memory, device))
    if fields.get("data") and not any(cell.recipe.data for cell in planned.cells.values()):
        make_recipe(fields, where)  # raises: no merge uses the data
    return planned


def check_possible(planned: Comparison, out: Path, progress: Progress) -> list[Planned]:
    """All that must hold before the work. Returns what the merges are judged by, and then, where that is not the same,
    what the chosen one is reported on. Raises RequestError."""
    if not is_free(out):
        raise taken(out)
    check_place(out)
    plan = planned.plan(planned.first)
    asked = [one for one in (planned.options.select, planned.asked.evaluate) if one is not None]
    judges = [Planned(plan, one, progress) for one in asked]
    if planned.asked.target is not None:
        check_push(planned.asked.target, {name: one.source for name, one in plan.inputs.items()}, "compare")
    check_inputs(plan)
    check_disk(out, planned.largest)
    return judges


def carry_out(
    planned: Comparison, out: Path, progress: Progress, announce: Callable[[], object] = lambda: None
) -> ComparisonReport:
    """Make and score the merges, and write the report.

    announce: called once all is checked, before the work. Raises like `compare`.
    """
    work = work_dir_beside(out, planned.fingerprint)
    remove_finished(work)
    judges = check_possible(planned, out, progress)
    announce()
    with progress.steps(STEPS), working_in(work, out, Processes()):
        take_over(work)
        try:
            return ComparisonRun(planned, judges, work, progress).run(out)
        except RequestError as error:
            if not has_scores(work):
                raise
            raise WorkError(f"{error} Then run the same command again: what was scored is not made again.") from error

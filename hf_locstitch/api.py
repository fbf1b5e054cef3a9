"""The package from Python: `merge_from_hub`, `localize_from_hub`, `stitch_from_hub`, and what they return.

The command line is a thin layer over this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_locstitch.artifacts.manifest import told
from hf_locstitch.engine import execute as engine
from hf_locstitch.engine.imports import import_ahead
from hf_locstitch.engine.steps import EVALUATING, EXPORTING
from hf_locstitch.errors import RecipeError
from hf_locstitch.exports.beside_merge import check_adapter, write_adapter
from hf_locstitch.localize.localizer import Localizer
from hf_locstitch.plan.adapter_inputs import with_base
from hf_locstitch.plan.planning import make_localize_plan, make_plan
from hf_locstitch.plan.plans import MergePlan, ModelPlan, Plan, StitchPlan
from hf_locstitch.plan.recipe import Recipe, make_recipe
from hf_locstitch.plan.recipe_file import load_recipe
from hf_locstitch.plan.restitch import Change, restitch
from hf_locstitch.runtime import html
from hf_locstitch.runtime.escape import line
from hf_locstitch.runtime.human import counted
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.runtime.settings import Settings, make_settings
from hf_locstitch.stitch.fitting import Stitcher
from hf_locstitch.stitch.method import Method

if TYPE_CHECKING:
    from hf_locstitch.artifacts.manifest import Manifest
    from hf_locstitch.evaluation.report import EvaluationReport
    from hf_locstitch.exports.export import ExportResult
    from hf_locstitch.runtime.processes import Processes

Ref = str | Path  # a folder, org/name or org/name@revision
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Data = Mapping[str, Any] | Sequence[Any] | str  # localization sets, by the finetunes' names or in their order


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge, a localization or a stitch.

    Attributes:
        out: The folder; None if it was only pushed.
        url: URL of the pushed repo; None if it was not pushed.
        commit: Commit of the pushed repo, 40 hex digits.
        manifest: The record, as in locstitch.json.
        evaluation: The scores, if the recipe requests an evaluation.
        adapter: The PEFT adapter, if the recipe requests one and no earlier call has written it.
    """

    out: Path | None
    url: str | None
    commit: str | None
    manifest: Manifest
    evaluation: EvaluationReport | None = None
    adapter: ExportResult | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        return {
            "out": None if self.out is None else str(self.out),
            "url": self.url,
            "commit": self.commit,
            "manifest": asdict(self.manifest),
            **({"evaluation": self.evaluation.as_json()} if self.evaluation else {}),
            **({"adapter": self.adapter.as_json()} if self.adapter else {}),
        }

    def describe(self, width: int | None = None) -> str:
        """A summary to print. width: of the terminal, for tables."""
        parts = [self._summary(), *(["", self.evaluation.describe(width)] if self.evaluation else [])]
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        """For notebooks: the same, and where the masks lie."""
        from hf_locstitch.report.card import ALT, TOP  # imports Jinja
        from hf_locstitch.report.figures.survey import FOLDER

        figure = html.picture(self.out / FOLDER / TOP, ALT) if self.out else None
        shown = html.page(html.summary(self._summary()), figure)
        return shown + (self.evaluation._repr_html_() if self.evaluation else "")

    def _summary(self) -> str:
        done = "localized" if self.manifest.is_localized else "merged"
        lines = [f"{done:<9}  {self.out}"] if self.out else []
        lines += [f"published  {self.url} at {self.commit}"] if self.url else []
        densities = [f"{name} {100 * mask.real_density:.4g} %" for name, mask in told(self.manifest).masks.items()]
        lines += ["density    " + ", ".join(densities)] if densities else []
        lines += [f"lambda     {chosen}"] if (chosen := _chosen_lambda(self.manifest.stitch or {})) else []
        return "\n".join([*map(line, lines), *([self.adapter.describe()] if self.adapter else [])])


def _chosen_lambda(fit: Mapping[str, Any]) -> str:
    """Of a refit on inputs, as its record has it; empty for others."""
    chosen, tried = fit.get("lambda"), fit.get("lambdas", ())
    if chosen is None:
        return ""
    listed = [value if isinstance(value, str) else f"{value:g}" for value in tried]
    return f"{chosen}, chosen of {', '.join(listed)}" if len(listed) > 1 else str(chosen)


def merge_from_hub(
    base: Ref | None,
    finetuned: Ref | Sequence[Ref],
    *,
    out: Ref | None = None,
    adapter: Ref | None = None,
    push_to: str | None = None,
    private: bool | None = None,
    create_pr: bool | None = None,
    names: Sequence[str] | None = None,
    method: str | Mapping[str, Any] | Method | None = None,
    localizer: Localizer | Mapping[str, Any] | None = None,
    data: Data | None = None,
    stitch: Literal["mean", "refit"] | Mapping[str, Any] | Stitcher | None = None,
    scale: float | None = None,
    weights: Sequence[float] | Mapping[str, float | Mapping[str, float]] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    rest_from: str | None = None,
    files_from: str | None = None,
    tokenizer: str | None = None,
    embeddings: str | None = None,
    chat_template: str | None = None,
    also_copy: Sequence[str] | None = None,
    dtype: Dtype | None = None,
    shard_size: int | str | None = None,
    allow_non_finite: bool | None = None,
    figures: bool | None = None,
    strict: bool | None = None,
    evaluate: Mapping[str, Any] | None = None,
    cache: bool = True,
    max_memory: int | str | None = None,
    device: str | None = None,
    show_progress: bool | None = None,
) -> MergeResult:
    """Merge finetuned models into their base, by Localize-and-Stitch unless a `method` is given.

    Args:
        base: The pretrained model: a folder, org/name or org/name@revision. None takes the one that all adapters among
            the finetunes name.
        finetuned: One or several models finetuned from it, or PEFT adapters for it, likewise.
        out: A folder that does not exist yet. At least one of `out` and `push_to` is needed.
        adapter: A folder that does not exist yet for the merge as a PEFT adapter, too, as `export` writes it.
        push_to: A repo, org/name or org/name@branch, to push the merge to, in one commit.
        private: Whether a new repo is private.
        create_pr: Whether the merge is proposed there as a pull request.
        names: Names of the finetunes and their masks; the refs' last parts by default.
        method: "locstitch" (default), or a rival by its name, such as "ties", or its settings with its `name`.
        localizer: How masks are found; by magnitude, at the method's density, by default.
        data: A localization set for each finetune, for localizers that look at data, a refit and RegMean.
        stitch: How values under masks are found: their mean (default), or a refit on unlabelled inputs.
        scale: Factor on the stitched task vectors; 1 by default.
        weights: Factor on each finetune's task vector, in order or by name, for methods that take weights: a number, or
            numbers by globs of tensors; 1 by default.
        include: Globs of the tensors that are localized; those of the transformer blocks by default.
        exclude: Globs of tensors that are left out.
        rest_from: Name of the finetune that gives the tensors that are not localized; the base by default.
        files_from: Name of the finetune that gives config and tokenizer; as `rest_from` by default.
        tokenizer: "base", "union" (default: the base's tokens and those that finetunes added) or a finetune's name.
        embeddings: Rows of the base's tokens: "base", a finetune's name, "mean" of the finetunes, or "localize"; as
            `include` and the method have it by default.
        chat_template: "base", a finetune's name, or a file; that of the tokenizer by default.
        also_copy: Globs of more files to copy, beside those that a model is known to need.
        dtype: Dtype of the output; the base's by default.
        shard_size: Largest file in bytes, or a string such as "5GB"; shards as in the base by default.
        allow_non_finite: Let NaN and infinity through.
        figures: Whether to draw figures of a merge with masks; True by default.
        strict: Whether warnings are errors: those of the plan at once, others before anything is published.
        evaluate: What the merge is evaluated on, as in a recipe: `{"suite": "quick"}`.
        cache: False streams the inputs and keeps none of them.
        max_memory: Memory limit in bytes, or a string such as "1GB".
        device: Where models run and values are solved for, as torch names it, or "auto"; as the recipe says by default.
        show_progress: None shows bars on a terminal only.

    Returns:
        Where the merge is, and its record.

    Raises:
        RequestError: If the request cannot be carried out; nothing was written.
        WorkError: If the work fails; the same call resumes from there.

    Example:
        >>> result = merge_from_hub("org/base", ["org/math", "org/code"], out="merged", localizer={"density": 0.05})
        >>> result.manifest.masks["math"].real_density
        0.05

    Source: https://arxiv.org/abs/2408.13656
    """
    recipe = _recipe(
        base=base, finetuned=_entries(finetuned, names), out=out, adapter=adapter, push_to=push_to,
        private=private, create_pr=create_pr, method=method,
        localizer=localizer, data=data, stitch=stitch, scale=scale, weights=weights, include=include, exclude=exclude,
        rest_from=rest_from, files_from=files_from, tokenizer=tokenizer, embeddings=embeddings,
        chat_template=chat_template, also_copy=also_copy, dtype=dtype, shard_size=shard_size,
        allow_non_finite=allow_non_finite, figures=figures, strict=strict, evaluate=evaluate,
    )  # fmt: skip
    return _carried_out(make_plan, recipe, make_settings(cache, max_memory, device), show_progress)


def localize_from_hub(
    base: Ref | None,
    finetuned: Ref,
    *,
    out: Ref | None = None,
    push_to: str | None = None,
    private: bool | None = None,
    create_pr: bool | None = None,
    name: str | None = None,
    stitch: Literal["mean", "refit"] | None = None,
    localizer: Localizer | Mapping[str, Any] | None = None,
    data: Data | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    allow_non_finite: bool | None = None,
    figures: bool | None = None,
    strict: bool | None = None,
    cache: bool = True,
    max_memory: int | str | None = None,
    device: str | None = None,
    show_progress: bool | None = None,
) -> MergeResult:
    """Reduce one finetuned model to its mask and the values under it: a localized checkpoint.

    Args:
        base: The pretrained model: a folder, org/name or org/name@revision. None takes the one that an adapter names.
        finetuned: The finetuned model, or a PEFT adapter, likewise.
        name: The name of its mask; the ref's last part by default.
        stitch: "refit" solves for the values under the mask again, so that it holds more of the model; they are then no
            longer the finetuned model's own.
        out, push_to, private, create_pr, localizer, data, include, exclude, allow_non_finite, figures, strict, cache,
            max_memory, device, show_progress: As in `merge_from_hub`.

    Returns:
        Where the localized checkpoint is, and its record.

    Raises:
        RequestError: If the request cannot be carried out; nothing was written.
        WorkError: If the work fails; the same call resumes from there.

    Example:
        >>> localize_from_hub("org/base", "org/math", push_to="me/math-localized")
    """
    recipe = _recipe(
        base=base, finetuned=_entries(finetuned, None if name is None else [name]), out=out, push_to=push_to,
        private=private, create_pr=create_pr, localizer=localizer, data=data, include=include, exclude=exclude,
        allow_non_finite=allow_non_finite, figures=figures, strict=strict, stitch=stitch,
    )  # fmt: skip
    return _carried_out(make_localize_plan, recipe, make_settings(cache, max_memory, device), show_progress)


def stitch_from_hub(
    base: Ref | None = None,
    localized: Ref | Sequence[Ref] = (),
    *,
    from_: Ref | None = None,
    add: Ref | Sequence[Ref] = (),
    remove: str | Sequence[str] = (),
    finetuned: Ref | Sequence[Ref] | None = None,
    out: Ref | None = None,
    adapter: Ref | None = None,
    push_to: str | None = None,
    private: bool | None = None,
    create_pr: bool | None = None,
    names: Sequence[str] | None = None,
    scale: float | None = None,
    also_copy: Sequence[str] | None = None,
    dtype: Dtype | None = None,
    shard_size: int | str | None = None,
    allow_non_finite: bool | None = None,
    figures: bool | None = None,
    strict: bool | None = None,
    cache: bool = True,
    max_memory: int | str | None = None,
    show_progress: bool | None = None,
) -> MergeResult:
    """Merge localized checkpoints into the base that they were localized against; or take a merge apart, and stitch it
    again with other finetunes or fewer.

    The weights are, bit for bit, those of one merge of the same finetuned models with the same settings, and with the
    base's tokens: localized checkpoints carry no new ones.

    Args:
        base: The pretrained model: a folder, org/name or org/name@revision. With `from_`, if it is not where that says.
        localized: One or several localized checkpoints, likewise.
        from_: A merge by hf-locstitch, likewise, in place of `localized`: its masks are used again, and values under
            them are read from the finetuned models that it names.
        add: Localized checkpoints to add to it.
        remove: Names of its finetunes to leave out.
        finetuned: Its finetunes that stay, in its order, if they are not where it says.
        names: Names of the masks; those they were localized under by default.
        out, adapter, push_to, private, create_pr, scale, also_copy, dtype, shard_size, allow_non_finite, figures,
            strict, cache, max_memory, show_progress: As in `merge_from_hub`.

    Returns:
        Where the merge is, and its record.

    Raises:
        RequestError: If the request cannot be carried out; nothing was written.
        WorkError: If the work fails; the same call resumes from there.

    Example:
        >>> stitch_from_hub("org/base", ["me/math-localized", "me/code-localized"], out="merged")
        >>> stitch_from_hub(from_="me/merged", add="me/law-localized", remove="code", out="changed")
    """
    settings = {
        "out": out, "adapter": adapter, "push_to": push_to, "private": private, "create_pr": create_pr,
        "scale": scale, "also_copy": also_copy, "dtype": dtype,
        "shard_size": shard_size, "allow_non_finite": allow_non_finite, "figures": figures, "strict": strict,
    }  # fmt: skip
    if from_ is None:
        if add or remove or finetuned is not None:
            raise RecipeError("add, remove and finetuned say what becomes of a merge, but none is given. Give from_.")
        recipe = _recipe(base=base, localized=_entries(localized, names), **settings)
    else:
        if localized or names is not None:
            raise RecipeError("from_ takes everything from the merge, beside localized. Drop one of the two; add adds.")
        given = None if finetuned is None else _refs(finetuned)
        change = Change(str(from_), _refs(add), _refs(remove), None if base is None else str(base), given)
        recipe = _recipe(**{**restitch(change), **{key: value for key, value in settings.items() if value is not None}})
    return _carried_out(make_plan, recipe, make_settings(cache, max_memory), show_progress)


def plan_merge(
    recipe: Recipe | Mapping[str, Any] | Ref,
    *,
    cache: bool = True,
    max_memory: int | str | None = None,
    device: str | None = None,
) -> MergePlan | StitchPlan:
    """Pin every revision, read every header, and say what a merge would do.

    Of weights a small sample is read; nothing is written.

    Args:
        recipe: A recipe, its fields, or the path of a YAML file.
        cache, max_memory, device: As in `merge_from_hub`.

    Returns:
        The plan: plain data. `hf_locstitch.plan.describe.format_plan` prints it.

    Raises:
        RequestError: With every problem found.

    Example:
        >>> plan = plan_merge({"base": "org/base", "finetuned": ["org/math", "org/code"]})
        >>> plan.k
        321200947
    """
    if isinstance(recipe, str | Path):
        recipe = make_recipe(with_base(load_recipe(Path(recipe))), where=str(recipe))
    elif not isinstance(recipe, Recipe):
        recipe = make_recipe(with_base(recipe))
    return make_plan(recipe, make_settings(cache, max_memory, device))


def check_possible(plan: Plan) -> None:
    """All that must hold before a plan is carried out, without the work. Raises RequestError."""
    engine.check_possible(plan)
    if isinstance(plan, ModelPlan):
        _after_merge(plan, Progress(False), {})


def _carried_out(
    make: Callable[[Recipe, Settings], Plan], recipe: Recipe, settings: Settings, show_progress: bool | None
) -> MergeResult:
    import_ahead()
    return carry_out(make(recipe, settings), Progress(show_progress))


def carry_out(plan: Plan, progress: Progress, announce: Callable[[], object] = lambda: None) -> MergeResult:
    """Carry out a plan, export and evaluate the result if the recipe says so, and publish it.

    announce: called once all is checked, before the work. Raises like merge_from_hub.
    """
    made: dict[str, Any] = {}

    def prepare() -> engine.AfterRun | None:
        after = _after_merge(plan, progress, made) if isinstance(plan, ModelPlan) else None
        announce()
        return after

    with progress.steps(engine.steps_of(plan)):
        done = engine.execute(plan, progress, prepare)
    return MergeResult(done.out, done.url, done.commit, done.manifest, **made)


def _after_merge(plan: ModelPlan, progress: Progress, made: dict[str, Any]) -> engine.AfterRun | None:
    """What is still to be done with a finished merge, checked beforehand; it fills in fields of the MergeResult."""
    check_adapter(plan)
    if plan.recipe.adapter is None and plan.recipe.evaluate is None:
        return None
    judge = None
    if plan.recipe.evaluate is not None:
        from hf_locstitch.evaluation.evaluate import AfterMerge

        judge = AfterMerge(plan, progress)

    def after(out: Path, processes: Processes) -> None:
        if plan.recipe.adapter is not None:
            progress.step(EXPORTING)
            made["adapter"] = write_adapter(plan, out, progress)
        if judge is not None:
            progress.step(EVALUATING)
            made["evaluation"] = judge.run(out, processes)

    return after


def _recipe(**fields: Any) -> Recipe:
    """A recipe of the arguments that are not None."""
    return make_recipe(with_base({name: value for name, value in fields.items() if value is not None}))


def _entries(refs: Ref | Sequence[Ref], names: Sequence[str] | None) -> list[dict[str, str]]:
    """Entries of a recipe. Raises RecipeError unless there is a name for each ref, or none."""
    entries = [{"ref": ref} for ref in _refs(refs)]
    if names is None:
        return entries
    if len(names) != len(entries):
        raise RecipeError(
            f"got {counted(len(names), 'name')} for {counted(len(entries), 'finetune')}. Give one name per finetune."
        )
    return [{**entry, "name": name} for entry, name in zip(entries, names, strict=True)]


def _refs(refs: Ref | Sequence[Ref]) -> list[str]:
    """One alone, too."""
    return [str(ref) for ref in ([refs] if isinstance(refs, str | Path) else refs)]

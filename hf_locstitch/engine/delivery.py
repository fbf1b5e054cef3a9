"""What is made in one piece, beside merges: a folder, a pushed repo, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_locstitch.checkpoints.source import Source
from hf_locstitch.engine.execute import by_hand, check_push, scratch
from hf_locstitch.engine.preflight import check_place, check_space, is_free, taken
from hf_locstitch.engine.work_dir import WorkDir, work_dir_beside, working_in
from hf_locstitch.errors import PublishError, RecipeError
from hf_locstitch.plan.push_target import PushTarget, parse_target
from hf_locstitch.runtime import html
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.runtime.progress import Progress

if TYPE_CHECKING:
    from hf_locstitch.report.publish import Published

T = TypeVar("T")


@dataclass(frozen=True)
class Delivered:
    """What was made, as `facts`, and where it is: a folder, a pushed repo at a commit, or both."""

    out: Path | None
    url: str | None
    commit: str | None
    facts: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        out = None if self.out is None else str(self.out)
        return {"out": out, "url": self.url, "commit": self.commit, **self.facts}

    def places(self, done: str) -> list[str]:
        """The first lines of a summary. done: what was done, in one word."""
        lines = [f"{done:<9}  {self.out}"] if self.out else []
        return [*lines, *([f"published  {self.url} at {self.commit}"] if self.url else [])]

    def describe(self) -> str:
        """A summary to print."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """For notebooks: what `describe` says."""
        return html.page(html.summary(self.describe()))


@dataclass(frozen=True)
class Delivery:
    """Where a result goes. command: that makes it, such as "export". At least one of out and target is needed."""

    command: str
    out: Path | None
    target: PushTarget | None
    private: bool = False

    @property
    def repo(self) -> str:
        """What the result's own card calls it."""
        return self.target.repo if self.target else "DIR"

    def check(self, inputs: Mapping[str, Source], nbytes: int) -> None:
        """All that must hold before the work. nbytes: of the result. Raises RequestError."""
        if self.target is not None:
            check_push(self.target, inputs, self.command)
        elif self.private:
            raise RecipeError("private applies to the pushed repo: it needs --push-to.")
        if self.out is not None and not is_free(self.out):
            raise taken(self.out)
        check_place(self._near)
        check_space(self._near, nbytes)

    def make(
        self, fingerprint: str, work: Callable[[WorkDir], T], message: str, progress: Progress
    ) -> tuple[T, str | None, str | None]:
        """What `work` returns, and URL and commit of the pushed repo, if it was pushed.

        fingerprint: of the result. work: fills the stage of a folder. message: of the commit. Raises WorkError; the
        same call then starts the work again.
        """
        published: Published | None = None
        with working_in(work_dir_beside(self._near, fingerprint), self.out, Processes()) as folder:
            found = work(folder)
            if self.out is None:
                published = self._publish(folder.stage, message, progress)
        if self.out is not None and self.target is not None:
            try:
                published = self._publish(self.out, message, progress)
            except PublishError as error:
                raise PublishError(
                    f"the {self.command} is complete in {self.out}, but {error} {by_hand(self.target, self.out)}"
                ) from error
        return (found, None, None) if published is None else (found, published.url, published.commit)

    @property
    def _near(self) -> Path:
        """Beside which the work is done."""
        if self.out is not None:
            return self.out
        assert self.target is not None
        return scratch(self.target) / self.command

    def _publish(self, folder: Path, message: str, progress: Progress) -> Published:
        from hf_locstitch.report.publish import Upload

        assert self.target is not None
        upload = Upload(self.target, private=self.private)
        try:
            return upload.commit(folder, message, progress)
        finally:
            upload.close()


def make_target(push_to: str | None, create_pr: bool) -> PushTarget | None:
    """Raises RecipeError if it names no repo."""
    if push_to is None:
        if create_pr:
            raise RecipeError("create_pr opens a pull request in the pushed repo: it needs --push-to.")
        return None
    try:
        return parse_target(push_to, create_pr)
    except ValueError as error:
        raise RecipeError(f"push_to: {error} (got {push_to!r}).") from error

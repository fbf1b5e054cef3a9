"""Parameters that make up tensors on disk together: they wait here until all of a group are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from hf_locstitch.tasks.parameter_names import Group, to_disk


class ParamGroups:
    """model: whose parameters these are. writes: whether any of some tensors on disk is this process's."""

    def __init__(self, model: Any, writes: Callable[[Sequence[str]], bool]) -> None:
        self._model, self._writes = model, writes
        self._waiting: dict[Group, dict[str, Tensor]] = {}

    def keep(self, group: Group, parameter: str, values: Tensor) -> dict[str, Tensor]:
        """This process's tensors of the group by their names on disk, once it is whole; none before."""
        if not self._writes(group.disk):
            return {}
        waiting = self._waiting.setdefault(group, {})
        waiting[parameter] = values
        return self._own(group, self._waiting.pop(group)) if len(waiting) == len(group.parameters) else {}

    def rest(self, load: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Those of groups that are not whole. load: gives the values of a parameter that never came."""
        for group, known in self._waiting.items():
            whole = {name: known[name] if name in known else load(name) for name in group.parameters}
            yield from self._own(group, whole).items()
        self._waiting.clear()

    def _own(self, group: Group, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = to_disk(self._model, group, parameters)
        return {name: values for name, values in tensors.items() if self._writes([name])}

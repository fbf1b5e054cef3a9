"""Parameters that together form tensors on disk: they wait here until their group is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from hf_locstitch.tasks.parameter_names import Group, to_disk


class ParamGroups:
    """model: the owner of the parameters. writes: whether this process writes any of the given tensors on disk."""

    def __init__(self, model: Any, writes: Callable[[Sequence[str]], bool]) -> None:
        self._model, self._writes = model, writes
        self._waiting: dict[Group, dict[str, Tensor]] = {}

    def keep(self, group: Group, parameter: str, values: Tensor) -> dict[str, Tensor]:
        """This process's tensors of the group by their names on disk, once the group is complete; empty before."""
        if not self._writes(group.disk):
            return {}
        waiting = self._waiting.setdefault(group, {})
        waiting[parameter] = values
        return self._own(group, self._waiting.pop(group)) if len(waiting) == len(group.parameters) else {}

    def rest(self, load: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of incomplete groups. load: gives the values of a parameter that was not fitted."""
        for group, known in self._waiting.items():
            whole = {name: known[name] if name in known else load(name) for name in group.parameters}
            yield from self._own(group, whole).items()
        self._waiting.clear()

    def _own(self, group: Group, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = to_disk(self._model, group, parameters)
        return {name: values for name, values in tensors.items() if self._writes([name])}

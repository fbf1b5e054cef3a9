"""Components by name: the package's own, one module each, and those that other packages add by an entry point.

A module of the registry's package holds one component, called COMPONENT; its name is the module's, with dashes. An
entry point names the class itself. Names are listed without importing anything, so that help is quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import Annotated, Any, Generic, TypeVar, Union

T = TypeVar("T")


class Registry(Generic[T]):
    """package: whose modules are components. path: its `__path__`. group: of the entry points."""

    def __init__(self, package: str, path: Sequence[str], group: str) -> None:
        self._package, self._path, self._group = package, path, group

    @cached_property
    def _modules(self) -> Mapping[str, str]:
        return {module.name.replace("_", "-"): module.name for module in iter_modules(self._path)}

    @cached_property
    def _entry_points(self) -> Mapping[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self._group) if point.name not in self._modules}

    def names(self) -> list[str]:
        """The names of all components, sorted."""
        return sorted({*self._modules, *self._entry_points})

    def find(self, name: str) -> type[T]:
        """Raises KeyError with the nearest names."""
        if name in self._modules:
            return import_module(f"{self._package}.{self._modules[name]}").COMPONENT
        if name in self._entry_points:
            return self._entry_points[name].load()
        raise KeyError(f"{name!r} is unknown ({self.hint(name)})")

    def hint(self, name: str) -> str:
        """The nearest name, or all of them."""
        near = get_close_matches(name, self.names(), n=1, cutoff=0.5)
        return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(self.names())}"

    def union(self, field: str) -> Any:
        """A type for pydantic: any of the components, told apart by a field that holds its name."""
        from pydantic import Field

        members = self.all()
        return members[0] if len(members) == 1 else Annotated[Union[members], Field(discriminator=field)]  # noqa: UP007

    def all(self) -> tuple[type[T], ...]:
        """Every component; imports them."""
        return tuple(self.find(name) for name in self.names())

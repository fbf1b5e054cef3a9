"""Which rows of a data set are taken, and what their labels stand for: plain values, compared as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, StrictBool, StrictFloat, StrictInt, StrictStr

from hf_locstitch.errors import RequestError

TEXTS = ("text", "prompt", "completion")
READ = (("image",), ("text",), ("messages",), ("prompt", "completion"))  # the first that rows have is read

Value: TypeAlias = StrictStr | StrictBool | StrictInt | StrictFloat | None


def _one_alone(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _by_text(value: Any) -> Any:
    """Keys as text, whichever way YAML or JSON has them."""
    return {str(key): label for key, label in value.items()} if isinstance(value, Mapping) else value


Where: TypeAlias = Mapping[str, Annotated[tuple[Value, ...], BeforeValidator(_one_alone)]]
Labels: TypeAlias = Annotated[Mapping[str, StrictInt | StrictStr], BeforeValidator(_by_text)]


def allowed(columns: Mapping[str, Sequence[Any]], where: Mapping[str, Sequence[Value]]) -> list[int]:
    """Numbers of the rows that have one of the values given for each column, ascending. columns: those of `where`."""
    wanted = [where[name] for name in columns]
    rows = zip(*columns.values(), strict=True)
    return [
        number
        for number, row in enumerate(rows)
        if all(value in values for value, values in zip(row, wanted, strict=True))
    ]


def mapped(label: Any, labels: Mapping[str, int | str], where: str) -> int | str:
    """What a label of the data stands for. where: the data. Raises RequestError if it is not said."""
    if str(label) not in labels:
        raise RequestError(
            f"{where} has the label {label!r}, which the data's `labels` do not map ({', '.join(labels)}). Add it, or "
            "leave its rows out with `where`."
        )
    return labels[str(label)]


def check_texts(rows: Sequence[Mapping[str, Any]], first: int, where: str) -> None:
    """Raises RequestError unless all rows have what is read of any of them.

    first: the number of the first of them. where: the data.
    """
    read = next((names for names in READ if any(row.get(names[0]) is not None for row in rows)), ())
    for number, row in enumerate(rows, start=first + 1):
        for name in read:
            value = row.get(name)
            if not (isinstance(value, str) if name in TEXTS else value):
                raise RequestError(
                    f"{where} has {value!r} as the {name} of example {number}, not a text. Correct the data; in a CSV "
                    "file an empty cell is nothing, and digits alone are a number."
                )

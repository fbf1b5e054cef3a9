"""lm-eval's own options, as its command has them: scores are those of that command."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from hf_locstitch.checkpoints.ref import expand_home
from hf_locstitch.runtime.parsing import parse_yaml

SEEDS = (0, 1234, 1234, 1234)
OURS = ("pretrained", "device", "batch_size", "dtype", "max_length", "backend", "use_safetensors")
CODE = ("trust_remote_code", "custom_generate")  # would run Python of a repo


def pairs(value: Any) -> Any:
    """A mapping, or what the command line has in its place: texts KEY=VALUE, values as in YAML."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping) or not isinstance(value, list | tuple):
        return value
    if wrong := [one for one in value if "=" not in str(one)]:
        raise ValueError(f"{wrong[0]!r} is not KEY=VALUE")
    split = [str(one).split("=", 1) for one in value]
    return {key: parse_yaml(text) for key, text in split}


def _all_four(value: Any) -> Any:
    """One seed for all, alone or in a list."""
    alone = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    return (alone,) * len(SEEDS) if isinstance(alone, int) else value


Settings = Annotated[Mapping[str, Any], BeforeValidator(pairs)]
Seeds = Annotated[tuple[int, int, int, int], BeforeValidator(_all_four)]


class LmEvalOptions(BaseModel):
    """backend: by transformers (`hf`), or by `vllm` where that is installed. fewshot_as_multiturn: under a chat
    template, whether each example of the prompt is a turn of its own; by default it is. system_instruction: text before
    the prompts. max_length: tokens of a prompt and its answer, at most; as the model has it by default. gen_kwargs: of
    generation, over the tasks' own. model_args: more arguments of lm-eval's class for the backend. seed: one, or four:
    of Python, NumPy, torch and the examples in prompts. log_samples: a folder that gets every prompt and answer, one
    file a task; scores are then measured, cached or not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["hf", "vllm"] = "hf"
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    max_length: int | None = Field(default=None, ge=1)
    gen_kwargs: Settings = Field(default_factory=dict)
    model_args: Settings = Field(default_factory=dict)
    seed: Seeds = SEEDS
    log_samples: Path | None = None

    @field_validator("log_samples")
    @classmethod
    def _expand_home(cls, value: Path | None) -> Path | None:
        return None if value is None else expand_home(value)

    @field_validator("gen_kwargs", "model_args")
    @classmethod
    def _runs_no_code(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        if given := [key for key in CODE if key in value]:
            raise ValueError(f"{given[0]} would run Python code of a repo, which is never run")
        return value

    @field_validator("model_args")
    @classmethod
    def _leaves_ours(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        if given := [key for key in OURS if key in value]:
            raise ValueError(f"{given[0]} has an option of its own, or follows from the model: leave it out")
        return value

    @model_validator(mode="after")
    def _backend_is_here(self) -> LmEvalOptions:
        if self.backend == "vllm" and find_spec("vllm") is None:
            raise ValueError("the backend vllm needs the package vllm: pip install vllm, or use hf")
        return self

    def facts(self) -> dict[str, Any]:
        """What of them determines scores: what differs from the defaults, plain values."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude={"log_samples"})

"""Packages that an installation may lack: asked for by name before the work that needs them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType

from hf_locstitch.errors import RecipeError

MODELS = ("torch", "transformers", "accelerate")  # what runs models,
WITH_DATA = (*MODELS, "datasets")  # and on examples

EXTRA: Mapping[str, str] = MappingProxyType({
    "lm_eval": "eval", "optuna": "search", "trackio": "track", "gradio": "ui", "authlib": "ui",
})  # fmt: skip


def need(what: str, *packages: str, instead: str = "") -> None:
    """Check that packages can be imported, without importing them.

    Args:
        what: What needs them, as the user asked for it: `--track wandb`.
        packages: Their top-level modules.
        instead: What to do without them, as a sentence.

    Raises:
        RecipeError: If one is not installed; it names what to install.

    Example:
        >>> need("the configuration", "json")
    """
    missing = [package for package in packages if not installed(package)]
    if missing:
        whole = f"{what} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
        raise RecipeError(f"{whole}Install with: {install_command(*missing)}.{instead and f' {instead}'}")


def installed(package: str) -> bool:
    """Whether a top-level module is there."""
    return sys.modules[package] is not None if package in sys.modules else find_spec(package) is not None


def install_command(*packages: str) -> str:
    """What installs them: extras of this package where it has one for them, else the packages themselves."""
    extras = sorted({EXTRA[package] for package in packages if package in EXTRA})
    others = [package for package in packages if package not in EXTRA]
    ours = [f"'hf-locstitch[{','.join(extras)}]'"] if extras else []
    return f"pip install {' '.join([*ours, *others])}"

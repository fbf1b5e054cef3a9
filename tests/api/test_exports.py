"""The public names exist, are documented, and cost nothing before they are used."""

from __future__ import annotations

import inspect
import subprocess
import sys

import hf_locstitch


def test_public_names() -> None:
    for name in hf_locstitch.__all__:
        value = getattr(hf_locstitch, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__ or issubclass(value, Exception)
    assert set(hf_locstitch.__all__) <= set(dir(hf_locstitch)) | set(hf_locstitch._HOME)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, hf_locstitch; assert not {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

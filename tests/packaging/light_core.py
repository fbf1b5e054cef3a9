"""What the core must do where only the packages of requirements-light.txt are installed.

    python tests/packaging/light_core.py [PACKAGE...]

Makes a base and two finetunes in a temporary folder, and localizes, stitches, merges, verifies and inspects them; then
asks for what needs more, which has to say so before it writes anything. PACKAGE: hidden, as if it were not installed.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

HEAVY = ("torch", "transformers", "accelerate", "datasets", "peft")
DONE = [
    "merge --base ./base --ft ./a ./b --density 0.1 --out merged",
    "merge --base ./base --ft ./a ./b --method ties --out ties --no-figures",
    "localize --base ./base --ft ./a --out a-localized",
    "localize --base ./base --ft ./b --out b-localized",
    "stitch --base ./base --localized ./a-localized ./b-localized --out stitched",
    "verify ./merged --tensors all",
    "verify ./a-localized --tensors all",
    "verify ./stitched --tensors all",
    "inspect ./merged",
]
REFUSED = {
    "merge --base ./base --ft ./a ./b --method tsv-m --out refused": "the method tsv-m needs torch",
    "merge --base ./base --ft ./a ./b --localizer joint --stitch refit --out refused": "localizer joint needs torch",
    "localize --base ./base --ft ./a --localizer saliency --data x.jsonl --out refused": "saliency needs torch",
    "merge --base ./base --ft ./a ./b --stitch refit --out refused": "stitch: refit needs torch",
    "evaluate ./merged --tasks mmlu": "evaluate needs torch",
    "finetune --base ./base --data sst2 --out refused": "finetune needs torch",
    "export ./merged --out refused": "export needs peft",
}


def check(hidden: list[str]) -> None:
    """Raises AssertionError."""
    sys.modules.update(dict.fromkeys(hidden))
    make_models()
    from hf_locstitch.cli.main import main

    for command in DONE:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main(command.split())
        assert status == 0, f"{command}: {said.getvalue()}"
    assert Path("merged/model.safetensors").read_bytes() == Path("stitched/model.safetensors").read_bytes()
    for command, due in REFUSED.items():
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = main(command.split())
        assert status == 2 and due in said.getvalue() and "pip install" in said.getvalue(), said.getvalue()
        assert not Path("refused").exists(), command
    assert not [name for name in HEAVY if sys.modules.get(name)], "the core imported what it has to do without"


def make_models() -> None:
    """./base, ./a and ./b."""
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (9, 4), "model.layers.0.mlp.up_proj.weight": (64, 4)}
    base = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    changed = {
        name: {tensor: v + rng.standard_normal(v.shape, np.float32) / 10 for tensor, v in base.items()} for name in "ab"
    }
    for name, state in {"base": base, **changed}.items():
        Path(name).mkdir()
        save_file(state, f"{name}/model.safetensors", {"format": "pt"})
        Path(name, "config.json").write_text('{"model_type": "toy"}')


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        check(sys.argv[1:])
        os.chdir("/")
    print("the light core does what it must")

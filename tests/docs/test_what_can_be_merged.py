"""Every row of the table of checkpoints (docs/guides/checkpoints.md) is tried."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from helpers.adapters import config_of, save_adapter, save_base, save_lora
from helpers.families import build
from helpers.models import State, finetune, load, random_state, save, save_sharded
from helpers.runs import quick_merge
from safetensors.torch import save_file

from hf_locstitch.errors import LocstitchError

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
BASE = random_state(0)
FT = finetune(BASE, 1)


def merges(tmp: Path, base: Path, *finetuned: Path, warns: str = "", **fields: object) -> State:
    """What is merged, of which some tensor has changed; warns: a pattern in a warning, that none has if empty."""
    result = quick_merge(base, [*finetuned], out=tmp / "out", **{"localizer": {"density": 0.3}, **fields})
    said = " ".join(result.manifest.warnings)
    assert re.search(warns, said) if warns else not result.manifest.warnings, said
    merged, before = load(tmp / "out"), load(base)
    assert any(not torch.equal(merged[name], before[name]) for name in before)
    return merged


def refused(tmp: Path, base: Path, *finetuned: Path, because: str, **fields: object) -> None:
    with pytest.raises(LocstitchError, match=because):
        quick_merge(base, [*finetuned], out=tmp / "out", **fields)
    assert not (tmp / "out").exists()


def toys(tmp: Path, base: State = BASE, tuned: State = FT) -> tuple[Path, Path]:
    return save(tmp / "base", base), save(tmp / "ft", tuned)


def renamed(state: State, change: Callable[[str], str]) -> State:
    return {change(name): value for name, value in state.items()}


def with_file(folder: Path, file: str, content: bytes = b"made up") -> Path:
    """The folder with a file in place of its weights."""
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    return folder


def plain(tmp: Path) -> None:
    merges(tmp, *toys(tmp))


def sharded(tmp: Path) -> None:
    base = save_sharded(tmp / "base", BASE, lambda names: [names[:3], names[3:]])
    merges(tmp, base, save(tmp / "ft", FT))
    assert len(list((tmp / "out").glob("model-*.safetensors"))) == 2


def one_file(tmp: Path) -> None:
    base, ft = toys(tmp)
    (ft / "model.safetensors").rename(ft / "weights-final.safetensors")
    merges(tmp, base, ft)
    assert (tmp / "out" / "model.safetensors").exists()


def part(tmp: Path) -> None:
    base, ft = toys(tmp)
    (ft / "model.safetensors").rename(ft / "step9.safetensors")
    save_file({Q: FT[Q]}, ft / "step8.safetensors")
    merges(tmp, base, ft / "step9.safetensors")


def component(tmp: Path) -> None:
    base, ft = toys(tmp)
    for folder in (base, ft):
        (folder / "model.safetensors").rename(folder / "diffusion_pytorch_model.safetensors")
    merges(tmp, base, ft)
    assert (tmp / "out" / "diffusion_pytorch_model.safetensors").exists()


def variant(tmp: Path) -> None:
    base, ft = toys(tmp)
    save_file({name: value.half() for name, value in BASE.items()}, base / "model.fp16.safetensors")
    merges(tmp, base, ft, warns=r"model\.fp16\.safetensors")


def shard(tmp: Path) -> None:
    base, ft = save_sharded(tmp / "base", BASE, lambda names: [names[:3], names[3:]]), save(tmp / "ft", FT)
    refused(tmp, base / "model-00001-of-00002.safetensors", ft, because=r"one of the 2 files .*index\.json lists")
    for file in ("model-00002-of-00002.safetensors", "model.safetensors.index.json"):
        (base / file).unlink()
    alone = r"model-00001-of-00002\.safetensors alone, one of the 2 files of a model: the others and .* are missing"
    refused(tmp, base, ft, because=alone)
    refused(tmp, base / "model-00001-of-00002.safetensors", ft, because=alone)
    (base / "model-00001-of-00002.safetensors").unlink()
    save_file(BASE, base / "model-00001-of-00001.safetensors")
    merges(tmp, base, ft)


def several_files(tmp: Path) -> None:
    base, ft = toys(tmp)
    save_file({Q: FT[Q]}, ft / "a.safetensors")
    (ft / "model.safetensors").rename(ft / "b.safetensors")
    refused(tmp, base, ft, because="2 safetensors files")


def pickled(tmp: Path) -> None:
    base, ft = toys(tmp)
    refused(tmp, base, with_file(ft, "pytorch_model.bin"), because="never opened")


def gguf(tmp: Path) -> None:
    base, ft = toys(tmp)
    refused(tmp, base, with_file(ft, "model-q4.gguf"), because="GGUF")


def mistral(tmp: Path) -> None:
    base, ft = toys(tmp)
    (ft / "model.safetensors").rename(ft / "consolidated.safetensors")
    refused(tmp, base, ft, because="Mistral's own format")


def quantized(tmp: Path) -> None:
    base, ft = toys(tmp)
    config = {"model_type": "toy", "quantization_config": {"quant_method": "gptq"}}
    (ft / "config.json").write_text(json.dumps(config))
    refused(tmp, base, ft, because=r"is quantized \(gptq\)")


def adapter(tmp: Path) -> None:
    base = save_base(tmp / "base")
    merges(tmp, base, save_lora(tmp / "lora", base), localizer={"density": 0.05})


def prompts(tmp: Path) -> None:
    base = save_base(tmp / "base")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    refused(tmp, base, save_adapter(tmp / "prompt", base, config), because="PROMPT_TUNING")


def pickled_adapter(tmp: Path) -> None:
    base = save_base(tmp / "base")
    lora = save_lora(tmp / "lora", base)
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    refused(tmp, base, lora, because=r"adapter_model\.bin")


def adapter_and_weights(tmp: Path) -> None:
    base = save_base(tmp / "base")
    lora = save_lora(tmp / "lora", base)
    tuned = {name: value + 0.1 for name, value in load(base).items()}
    save_file(tuned, lora / "model.safetensors", metadata={"format": "pt"})
    (lora / "config.json").write_bytes((base / "config.json").read_bytes())
    merges(tmp, base, lora, warns="adapter")


def adapter_as_base(tmp: Path) -> None:
    base = save_base(tmp / "base")
    first, second = save_lora(tmp / "first", base), save_adapter(tmp / "second", base, config_of("IA3"))
    refused(tmp, first, second, because="a base must be a whole model")


def prefixed(tmp: Path) -> None:
    ft = save(tmp / "ft", renamed(FT, lambda name: f"_orig_mod.{name}"))
    merges(tmp, save(tmp / "base", BASE), ft, warns="ft names 8 tensors otherwise")


def headless(tmp: Path) -> None:
    base = {name.removeprefix("model."): value for name, value in BASE.items() if name != "lm_head.weight"}
    merged = merges(tmp, save(tmp / "base", base), save(tmp / "ft", FT), warns="otherwise than the base")
    assert "lm_head.weight" not in merged


def text_only(tmp: Path) -> None:
    vision = {"model.visual.blocks.0.w": torch.ones(4, 4)}
    base = renamed(BASE, lambda name: name.replace("model.", "model.language_model."))
    merged = merges(tmp, save(tmp / "base", {**base, **vision}), save(tmp / "ft", FT), warns="otherwise",
                    exclude=["model.visual.*"])  # fmt: skip
    assert torch.equal(merged["model.visual.blocks.0.w"], vision["model.visual.blocks.0.w"])


def experts(tmp: Path) -> None:
    model = build("qwen3-moe", torch.float32)
    model.save_pretrained(tmp / "base")
    tuned = {name: value + 0.1 for name, value in model.state_dict().items()}
    ft = save(tmp / "ft", tuned, (tmp / "base" / "config.json").read_text())
    merged = merges(tmp, tmp / "base", ft, warns="cut otherwise than in the base")
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in merged


def gamma(tmp: Path) -> None:
    base = {"encoder.layer.0.LayerNorm.weight": torch.ones(6), "encoder.layer.0.q.weight": BASE[Q]}
    tuned = {"encoder.layer.0.LayerNorm.gamma": torch.ones(6) + 1, "encoder.layer.0.q.weight": FT[Q]}
    merged = merges(tmp, save(tmp / "base", base), save(tmp / "ft", tuned), warns="gamma")
    assert merged["encoder.layer.0.LayerNorm.weight"].eq(2).any()


def predictors(tmp: Path) -> None:
    extra = {"mtp.layers.0.up_proj.weight": torch.ones(9, 6)}
    merged = merges(tmp, save(tmp / "base", {**BASE, **extra}), save(tmp / "ft", FT), warns="multi-token prediction")
    assert merged["mtp.layers.0.up_proj.weight"].eq(1).all()


def tied(tmp: Path) -> None:
    config = '{"model_type": "toy", "tie_word_embeddings": true}'
    base = {name: value for name, value in BASE.items() if name != "lm_head.weight"}
    tuned = {**FT, "lm_head.weight": FT["model.embed_tokens.weight"].clone()}
    folders = save(tmp / "base", base, config), save(tmp / "ft", tuned, config)
    quick_merge(folders[0], [folders[1]], out=tmp / "out", localizer={"density": 0.5})
    assert load(tmp / "out").keys() == base.keys()


def narrow(tmp: Path) -> None:
    base = {name: value.bfloat16() for name, value in BASE.items()}
    merged = merges(tmp, save(tmp / "base", base), save(tmp / "ft", FT), warns="BF16|F32")
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}


def lacks(tmp: Path) -> None:
    base, ft = toys(tmp, tuned={name: value for name, value in FT.items() if name not in (Q, UP)})
    refused(tmp, base, ft, because=rf"{re.escape(Q)}, which the base .* has \(and 1 more\)")


def other_shape(tmp: Path) -> None:
    base, ft = toys(tmp, tuned={**FT, UP: torch.ones(8, 6)})
    refused(tmp, base, ft, because=r"\[8, 6\].*\[9, 6\]")


def integers(tmp: Path) -> None:
    extra = {"model.layers.0.count": torch.tensor([7]), "model.layers.0.rotary_emb.inv_freq": torch.ones(3)}
    tuned = {"model.layers.0.count": torch.tensor([9]), "model.layers.0.rotary_emb.inv_freq": torch.zeros(3)}
    folders = toys(tmp, {**BASE, **extra}, {**FT, **tuned})
    quick_merge(folders[0], [folders[1]], out=tmp / "out", localizer={"density": 0.5})
    merged = load(tmp / "out")
    assert all(torch.equal(merged[name], value) for name, value in extra.items())


def not_finite(tmp: Path) -> None:
    bad = FT[Q].clone()
    bad[2, 3] = torch.nan
    refused(tmp, *toys(tmp, tuned={**FT, Q: bad}), because=f"{re.escape(Q)}.*NaN at flat index 15")


def cut_off(tmp: Path) -> None:
    base, ft = toys(tmp)
    weights = ft / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(tmp, base, ft, because=r"ft/model\.safetensors")


def own_code(tmp: Path) -> None:
    config = '{"model_type": "toy", "auto_map": {"AutoModelForCausalLM": "code.Model"}}'
    base, ft = save(tmp / "base", BASE, config), save(tmp / "ft", FT, config)
    refused(tmp, base, ft, because="code", stitch="refit")
    quick_merge(base, [ft], out=tmp / "out", localizer={"density": 0.5})


ROWS: dict[str, Callable[[Path], None]] = {
    "`model.safetensors`": plain,
    "shards and their index": sharded,
    "one safetensors file of any other name": one_file,
    "a subfolder of a repo, or one file": part,
    "a component of diffusers": component,
    "`model.fp16.safetensors` beside `model.safetensors`": variant,
    "one file of a model in several": shard,
    "several safetensors files without an index": several_files,
    "pickled weights only": pickled,
    "GGUF": gguf,
    "Mistral's own format": mistral,
    "GPTQ, AWQ": quantized,
    "a PEFT adapter that PEFT can merge": adapter,
    "an adapter of prompts or prefixes": prompts,
    "an adapter in `adapter_model.bin`": pickled_adapter,
    "an adapter beside whole weights": adapter_and_weights,
    "an adapter as the base": adapter_as_base,
    "a finetune whose names have a prefix": prefixed,
    "a headless base": headless,
    "a text-only finetune": text_only,
    "experts one by one beside experts in a stack": experts,
    "norms' `gamma` and `beta`": gamma,
    "a finetune without the base's layers for multi-token prediction": predictors,
    "a tied head stored by one side alone": tied,
    "bfloat16 beside float32": narrow,
    "a finetune that lacks a tensor of the blocks": lacks,
    "a finetune with a block's tensor in another shape": other_shape,
    "integer tensors and buffers": integers,
    "NaN or infinity in a weight": not_finite,
    "a cut-off or damaged file": cut_off,
    "code in the repo": own_code,
}


def test_every_row_is_tried() -> None:
    table = (Path(__file__).parents[2] / "docs" / "guides" / "checkpoints.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(ROWS)
    assert all(row.startswith(start) for row, start in zip(rows, ROWS, strict=True))


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.__name__)
def test_row(row: Callable[[Path], None], tmp_path: Path) -> None:
    row(tmp_path)

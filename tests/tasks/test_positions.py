"""Texts that are longer than a model has positions for: refused, or cut, before any model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from demo.skills import make_tokenizer
from helpers.architectures import TEXT
from helpers.data import write_jsonl
from helpers.families import build, noisy

from hf_locstitch import evaluate
from hf_locstitch.errors import RecipeError, RequestError
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.tasks.objectives.causal_lm import CausalLM
from hf_locstitch.tasks.objectives.clip_zero_shot import ClipZeroShot
from hf_locstitch.tasks.positions import fewer_positions, within_positions
from hf_locstitch.training.planning import plan_finetune
from hf_locstitch.training.request import make_request

PADDED = {**TEXT, "pad_token_id": 1}
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 40,
        "pad_token_id": 1, "decoder_start_token_id": 2}  # fmt: skip
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40}
ENDS = [  # each with the number of its positions
    ("BertConfig", TEXT, 40),
    ("RobertaConfig", PADDED, 38),  # its positions begin after that of the padding
    ("MPNetConfig", PADDED, 38),
    ("GPT2Config", GPT, 40),
    ("OPTConfig", {**PADDED, "ffn_dim": 8, "word_embed_proj_dim": 32}, 40),  # two rows of its table are none
    ("NystromformerConfig", TEXT, 40),  # so it is here
    ("GPTJConfig", {**GPT, "rotary_dim": 4}, 40),
    ("BartConfig", BART, 40),
    ("MarianConfig", BART, 40),
]


@pytest.mark.parametrize(("config_class", "fields", "count"), ENDS, ids=[config for config, *_ in ENDS])
def test_a_text_of_as_many_tokens_is_the_longest_that_runs(
    config_class: str, fields: dict[str, Any], count: int
) -> None:
    config = getattr(transformers, config_class)(**fields)
    assert fewer_positions("AutoModel", config.to_dict(), 512) == count
    assert fewer_positions("AutoModel", config.to_dict(), count) is None
    model = transformers.AutoModel.from_config(config)
    tokens = {name: torch.full((1, count + 1), 5) for name in ("input_ids", "decoder_input_ids")}
    if not config.is_encoder_decoder:
        del tokens["decoder_input_ids"]
    with torch.no_grad():
        model(**{name: ids[:, :count] for name, ids in tokens.items()})
        with pytest.raises((IndexError, RuntimeError)):
            model(**tokens)


def test_positions_without_an_end() -> None:
    for kind in ("llama", "falcon"):
        assert fewer_positions("AutoModelForCausalLM", build(kind).config.to_dict(), 512) is None
    t5 = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=8, num_layers=1, num_heads=4)
    assert fewer_positions("AutoModelForSeq2SeqLM", t5.to_dict(), 10_000) is None
    relative = transformers.DebertaV2Config(**TEXT, position_biased_input=False, relative_attention=True)
    assert fewer_positions("AutoModel", relative.to_dict(), 512) is None  # it numbers positions, and has no table
    assert fewer_positions("AutoModel", {"model_type": "nobodys"}, 512) is None


def test_a_default_gives_way_and_what_is_asked_for_is_refused() -> None:
    config = transformers.GPT2Config(**GPT).to_dict()
    assert within_positions(CausalLM(), config, "org/gpt").max_length == 40
    assert within_positions(CausalLM(max_length=32), config, "org/gpt").max_length == 32
    with pytest.raises(RecipeError, match=r"41 tokens are asked for, but org/gpt has positions for 40 only\. Set"):
        within_positions(CausalLM(max_length=41), config, "org/gpt")


def test_every_request_is_held_to_them(tmp_path: Path) -> None:
    """Localizing, refits, finetunes, labelled sets and lm-eval: the example alone is longer than the model."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT, "vocab_size": len(make_tokenizer())}))
    base, tuned = noisy(model, tmp_path / "base", 0), noisy(model, tmp_path / "tuned", 1)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "abcdefghij" * 6}])
    fields = {"base": str(base), "finetuned": [str(tuned)], "localizer": {"method": "saliency", "density": 0.5}}
    plan = make_plan(make_recipe({**fields, "data": [str(rows)], "stitch": "refit"}))
    for found in (plan.data["tuned"], plan.fit_data["tuned"]):
        assert found.pinned.dump()["objective"]["max_length"] == 40  # the recorded recipe says what was done
    long = {"ref": str(rows), "objective": {"kind": "causal-lm", "max_length": 60}}
    asked = [
        lambda: make_plan(make_recipe({**fields, "data": [long]})),
        lambda: make_plan(make_recipe({**fields, "localizer": "magnitude", "stitch": {"data": [long]}})),
        lambda: plan_finetune(make_request({"base": str(base), "data": long}, "request")),
        lambda: evaluate(tuned, data={"rows": {**long, "split": "train"}}),
        lambda: evaluate(tuned, tasks=["arc_easy"], lm_eval={"max_length": 60}),
    ]
    for request in asked:
        with pytest.raises(RecipeError, match=r"60 tokens are asked for, but .* has positions for 40 only"):
            request()
    report = evaluate(tuned, data={"rows": {"ref": str(rows), "split": "train"}}, cache=False)
    assert report.subject.results[0].examples == 1


def test_names_of_classes_are_held_to_them() -> None:
    class Processor:
        tokenizer = make_tokenizer()
        image_processor = None

    with pytest.raises(RequestError, match=r"'=a{60}' has 62 tokens, but .* positions for 40 only"):
        ClipZeroShot(classes=("b", "a" * 60), prompt="={}").prepare([], Processor(), build("clip", torch.float32))

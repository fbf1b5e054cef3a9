"""Encoder–decoders: the prompt is read, only the answer is said and counts, as in training by transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from demo.skills import make_tokenizer
from helpers.architectures import T5
from helpers.data import ROWS, write_jsonl
from helpers.families import VOCABULARY, family
from helpers.models import load
from helpers.runs import quick_merge

from hf_locstitch import load_mask
from hf_locstitch.cli.main import main
from hf_locstitch.errors import RecipeError, RequestError
from hf_locstitch.runtime.shares import exact_share
from hf_locstitch.stitch.refit.watching import _last_states
from hf_locstitch.tasks.alpaca import ALPACA
from hf_locstitch.tasks.choosing_objectives import suggest
from hf_locstitch.tasks.objectives.seq2seq import Seq2Seq

BART = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "T5": {**T5, "vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
    "UMT5": {**T5, "vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
    "Bart": BART,
    "MBart": BART,
    "Pegasus": BART,
    "M2M100": BART,
}


def make(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**KINDS[kind], **changes})
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases are zeros, norms ones
    return model


def reference(model: Any, rows: Sequence[dict[str, str]]) -> torch.Tensor:
    """The mean over answer tokens of transformers' own loss, one example at a time."""
    tokenizer, total, count = make_tokenizer(), torch.zeros(()), 0
    for row in rows:
        labels = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        loss = model(input_ids=ids, labels=torch.tensor([labels]), use_cache=False).loss
        total, count = total + len(labels) * loss, count + len(labels)
    return total / count


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_transformers(kind: str) -> None:
    """Of examples of unequal lengths, padded to one batch; the logits of no other tokens are made."""
    model = make(kind).double()
    task = Seq2Seq().prepare(ROWS, make_tokenizer(), model)
    loss = task.loss(model, task.examples) / sum(task.weights)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    due = reference(model, ROWS)
    due.backward()
    torch.testing.assert_close(loss, due, rtol=1e-9, atol=1e-12)
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-12)
    assert task.targets is not None
    assert len(task.outputs(model, task.examples)) == sum(task.weights) == len(task.targets(task.examples))


def texts(row: dict[str, Any], objective: Seq2Seq, tokenizer: Any) -> tuple[str, str]:
    ids, _, wanted = objective.prepare([row], tokenizer, make("T5")).examples[0]
    return tokenizer.decode(ids), tokenizer.decode(wanted)


def test_what_is_read_and_what_is_to_be_said() -> None:
    tokenizer = make_tokenizer()
    row = {"prompt": "copy cable=", "completion": "cable"}
    assert texts(row, Seq2Seq(), tokenizer) == ("<s>copy cable=", "<s>cable</s>")
    assert texts({**row, "instruction": True}, Seq2Seq(), tokenizer)[0] == "<s>copy cable="
    assert texts({"text": "abc"}, Seq2Seq(), tokenizer) == ("<s>abc", "<s>abc</s>")
    assert texts(row, Seq2Seq(max_length=3), tokenizer) == ("<s>copy c", "<s>ca")
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "cba"}]
    assert texts({"messages": turns}, Seq2Seq(), tokenizer) == ("<s>abc", "<s>cba</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    assert texts({"messages": turns}, Seq2Seq(), tokenizer) == ("<s>abc=", "<s>cba</s>")
    assert texts(row, Seq2Seq(), tokenizer)[0] == "<s>copy cable=="
    assert texts(row, Seq2Seq(template="none"), tokenizer)[0] == "<s>copy cable="


def test_the_template_of_instructions_on_request() -> None:
    objective, tokenizer = Seq2Seq(template="alpaca"), make_tokenizer()
    assert objective._texts({"prompt": "Go.", "completion": "Gone."}, tokenizer) == (
        ALPACA.format(instruction="Go."),
        "Gone.",
    )


def test_the_answer_is_tokenized_as_a_target() -> None:
    """As tokenizers of translation models ask for, whose targets begin with another language."""

    class Languages:
        eos_token_id, pad_token_id, chat_template = 2, 0, None

        def __call__(self, text: str = "", text_target: str = "", **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [7, *map(ord, text), 2] if text else [8, *map(ord, text_target), 2]}

    task = Seq2Seq().prepare([{"prompt": "a", "completion": "b"}], Languages(), make("M2M100"))
    assert task.examples == [([7, ord("a"), 2], [2, 8, ord("b")], [8, ord("b"), 2])]
    wrapped = Seq2Seq().prepare([{"prompt": "a", "completion": "b"}], Languages(), make("MBart")).examples[0]
    assert wrapped[1] == [2, 8, ord("b")]


def test_a_decoder_that_does_not_begin_and_rows_without_answers() -> None:
    model = make("M2M100")
    with pytest.raises(RequestError, match="none of the 1 examples"):
        Seq2Seq(max_length=1).prepare([{"prompt": "", "completion": ""}], NoTokens(), model)
    model.config.decoder_start_token_id = None
    with pytest.raises(RequestError, match="decoder_start_token_id is missing"):
        Seq2Seq().prepare(ROWS, make_tokenizer(), model)


class NoTokens:
    eos_token_id, pad_token_id, chat_template = None, None, None

    def __call__(self, *_: Any, **__: Any) -> dict[str, list[int]]:
        return {"input_ids": []}


def test_it_is_the_default_of_encoder_decoders_for_text() -> None:
    for name in ("T5", "MT5", "Bart", "MBart", "Pegasus", "LED", "T5Gemma"):
        named = f"{name}ForConditionalGeneration"
        assert suggest({"architectures": [named], "is_encoder_decoder": True}, "ft").kind == "seq2seq"
    assert suggest({"architectures": ["MarianMTModel"], "is_encoder_decoder": True}, "ft").kind == "seq2seq"
    for name, both in (("Whisper", True), ("Pix2Struct", True), ("Qwen2_5_VL", False), ("Voxtral", False)):
        with pytest.raises(RecipeError, match=name):
            suggest({"architectures": [f"{name}ForConditionalGeneration"], "is_encoder_decoder": both}, "ft")


@pytest.fixture(params=["T5", "Bart"])
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, ft0 and ft1, and a file of prompts and answers."""
    family(make(request.param), tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [*ROWS, *({**row, "prompt": row["prompt"].upper()} for row in ROWS)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_saliency_by_the_command(home: Path) -> None:
    """The masks keep what a reference finds on its own, through encoder, decoder and between."""
    asked = ["--base", "./base", "--ft", "./ft0", "./ft1", "--data", "rows.jsonl", "rows.jsonl", "--density", "0.1"]
    assert main(["merge", *asked, "--localizer", "saliency", "--out", "out", "--quiet", "--no-figures"]) == 0
    record = json.loads((home / "out" / "locstitch.json").read_text())
    assert record["data"]["ft0"]["ref"] == "./rows.jsonl"
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained("base")
    reference(model, [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]).backward()
    gradients, mask, tuned = dict(model.named_parameters()), load_mask(home / "out", "ft0"), load(home / "ft0")
    base = load(home / "base")
    scores = {name: ((tuned[name] - base[name]) * gradients[name].grad).abs() for name in mask}
    k = exact_share(0.1, sum(score.numel() for score in scores.values()))
    least = torch.cat([score.flatten() for score in scores.values()]).sort(descending=True).values[k - 1]
    assert record["k"] == sum(int(kept.sum()) for kept in mask.values()) == k
    for name, kept in mask.items():
        assert bool((scores[name][kept] >= least * (1 - 1e-3)).all())
        assert bool((scores[name][~kept] <= least * (1 + 1e-3)).all())
    parts = [".self_attn.", ".encoder_attn.", ".fc1."] if any(".fc1." in name for name in mask) else [
        ".SelfAttention.", ".EncDecAttention.", ".DenseReluDense."]  # fmt: skip
    assert all(any(part in name and bool(kept.any()) for name, kept in mask.items()) for part in parts)
    assert main(["merge", "out/locstitch.yaml", "--out", "again", "--quiet", "--no-figures"]) == 0
    files = [(home / out / "model.safetensors").read_bytes() for out in ("out", "again")]
    assert files[0] == files[1]


def test_a_learned_mask(home: Path) -> None:
    from hf_locstitch import Mask

    how = Mask(density=0.1, epochs=1, checkpointing=True)
    quick_merge("base", ["ft0"], out="out", localizer=how, data=["rows.jsonl"])
    assert load_mask(home / "out", "ft0")


def test_last_hidden_states_are_those_of_the_decoder() -> None:
    """A T5 has its stacks beside its head, a Bart has them in a model of their own."""
    for kind, module in (("T5", "decoder"), ("Bart", "model")):
        model = make(kind)
        assert _last_states(model) is model.get_submodule(module)


def test_a_refit_by_the_command(home: Path) -> None:
    """On prompts and answers, judged by the decoder's last hidden states; and by the loss of the answers."""
    asked = ["--base", "./base", "--ft", "./ft0", "./ft1", "--density", "0.3", "--quiet", "--no-figures"]
    recipe = "stitch: {method: refit, inputs: 10, held_out: 0.3, batch: 3, start: mean, lambdas: %s}\n"
    recipe += "data: [rows.jsonl, rows.jsonl]\n"
    for name, more in (("out", "[0.1, inf]"), ("loss", "[0.1], judge: loss")):
        Path("recipe.yaml").write_text(recipe % more)
        assert main(["merge", "recipe.yaml", *asked, "--out", name]) == 0
        stitch = json.loads((home / name / "locstitch.json").read_text())["stitch"]
        assert all("relative_attention_bias" in one for one in stitch["kept_plain"])
        refitted = set(stitch["refitted"])
        assert refitted >= {
            one for one in load(home / "base") if ".1." in one and "norm" not in one and "bias" not in one
        }
        assert name == "loss" or stitch["disagreement"]["0.1"] < stitch["disagreement"]["inf"]

"""Language models whose scores are known by construction, and the benchmarks to run them on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loopback_hub import LoopbackHub

WORDS = ("<unk>", "<s>", "</s>", "A", "B", "C", "D", "alpha", "beta", "gamma", "delta")
LOGIT = 3.0  # of a favoured word; all others have 0


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def favouring(folder: Path, words: Sequence[str], *, seed: int = 0) -> Path:
    """A Llama that gives these words LOGIT and every other 0, whatever stands before: blocks that add nothing to a
    constant. seed: of the blocks' other weights."""
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for word in words:
            model.lm_head.weight[WORDS.index(word)] = LOGIT / config.hidden_size
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def local_task(folder: Path, name: str, answers: Sequence[str]) -> Path:
    """A task of multiple choice on a file beside it: one example for each right answer, of A, B, C and D."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"question {number}", "answer": "ABCD".index(answer)} for number, answer in enumerate(answers)]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
        "doc_to_choice: ['A', 'B', 'C', 'D']\nmetric_list:\n  - metric: acc\nmetadata:\n  version: 1.0\n"
    )
    return folder


def _jsonl(rows: Sequence[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def add_data_set(
    hub: LoopbackHub, repo: str, configs: Mapping[str, Mapping[str, Sequence[Mapping[str, object]]]]
) -> None:
    """A data set on the Hub. configs: name -> split -> rows."""
    lines, files = ["---", "configs:"], {}
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
            files[f"{config}/{split}.jsonl"] = _jsonl(rows)
    hub.add_repo(repo, {"README.md": "\n".join([*lines, "---", ""]), **files}, repo_type="dataset")


def mmlu_subjects() -> list[str]:
    """lm-eval's own list of the 57."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    found = (yaml.safe_load(path.read_text().split("\ninclude", 1)[0] + "\n") for path in folder.glob("mmlu_*.yaml"))
    return sorted(fields["dataset_name"] for fields in found if "dataset_name" in (fields or {}))


def add_mmlu(hub: LoopbackHub, subjects: Sequence[str], answers: Sequence[int] = (1, 1, 0)) -> None:
    """cais/mmlu under its own schema. answers: right choices of each subject's test questions."""

    def rows(subject: str, right: Sequence[int]) -> list[Mapping[str, object]]:
        choices = ["one", "two", "three", "four"]
        return [
            {"question": f"{subject} {number}?", "subject": subject, "choices": choices, "answer": answer}
            for number, answer in enumerate(right)
        ]

    splits = {"test": answers, "dev": (0, 1, 2, 3, 0)}
    add_data_set(hub, "cais/mmlu", {s: {split: rows(s, right) for split, right in splits.items()} for s in subjects})


def add_arc(hub: LoopbackHub, right: Sequence[str]) -> None:
    """allenai/ai2_arc. right: labels A to D of the right answers alpha to delta, of every split."""

    def rows(config: str) -> list[Mapping[str, object]]:
        choices = {"text": ["alpha", "beta", "gamma", "delta"], "label": ["A", "B", "C", "D"]}
        return [
            {"id": f"{config}_{number}", "question": f"Which {number}?", "choices": choices, "answerKey": label}
            for number, label in enumerate(right)
        ]

    add_data_set(
        hub,
        "allenai/ai2_arc",
        {
            name: {"train": 13 * rows(name), "validation": rows(name), "test": rows(name)}  # 25 shots come from train
            for name in ("ARC-Easy", "ARC-Challenge")
        },
    )


def add_truthfulqa(hub: LoopbackHub, first: Sequence[str]) -> None:
    """truthfulqa/truthful_qa. first: the one true answer of each question, of two; the other is false."""

    def targets(word: str) -> Mapping[str, object]:
        return {"choices": [word, "gamma" if word != "gamma" else "delta"], "labels": [1, 0]}

    rows = [
        {"question": f"Is it {number}?", "mc1_targets": targets(word), "mc2_targets": targets(word)}
        for number, word in enumerate(first)
    ]
    add_data_set(hub, "truthfulqa/truthful_qa", {"multiple_choice": {"validation": rows}})


def add_benchmark(hub: LoopbackHub, folder: Path, name: str, answers: Sequence[str], *, gated: bool = False) -> str:
    """A task like local_task's in `folder` whose data are on the Hub, under a new id, which is returned."""
    local_task(folder, name, answers)
    dataset = f"demo/{uuid4().hex[:12]}-{name}"
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: test.jsonl\n---\n"
    files = {"README.md": readme, "test.jsonl": (folder / f"{name}.jsonl").read_text()}
    hub.add_repo(dataset, files, repo_type="dataset", gated="auto" if gated else False)
    head, _, rest = (folder / f"{name}.yaml").read_text().partition("dataset_kwargs:")
    rest = rest[rest.index("output_type") :]
    (folder / f"{name}.yaml").write_text(head.replace("dataset_path: json", f"dataset_path: {dataset}") + rest)
    return dataset

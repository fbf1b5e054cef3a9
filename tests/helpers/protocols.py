"""What the shipped recipes name, with shrunk shapes: bases, experts and data sets under their own ids and schemas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from demo.skills import make_tokenizer
from huggingface_hub import CommitOperationAdd, HfApi
from PIL import Image
from tokenizers import AddedToken, ByteLevelBPETokenizer

from helpers.architectures import TEXT, VISION
from helpers.language_models import add_data_set, favouring
from hf_locstitch.checkpoints.localizable import BLOCKS
from hf_locstitch.tasks.named_tasks import named_tasks
from loopback_hub import LoopbackHub

Rows = Sequence[Mapping[str, Any]]
TEXTS = ("A man plays the guitar.", "Somebody makes MUSIC on a stage.")


def roberta_tokenizer(folder: Path) -> Any:
    """A tokenizer as RoBERTa has it, of a small vocabulary with all label words in it."""
    words = {word for task in named_tasks().values() for word in task["objective"].get("label_words", ())}
    texts = [" ".join(f"It was {word}. This is {word}:" for word in sorted(words)), f"{TEXTS[0]} {TEXTS[0]}", TEXTS[1]]
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(texts * 5, vocab_size=1000, min_frequency=2, special_tokens=special)
    folder.mkdir(exist_ok=True)
    trained.save_model(str(folder))
    mask = AddedToken("<mask>", lstrip=True, special=True)  # as RoBERTa's own: a space before it is part of it
    return transformers.RobertaTokenizerFast.from_pretrained(folder, mask_token=mask)


def expert(base: Path, folder: Path, auto: str, seed: int) -> Path:
    """The base with noise on its blocks, and with its tokenizer."""
    model: Any = getattr(transformers, auto).from_pretrained(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if BLOCKS.search(name):
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def add_model(hub: LoopbackHub, repo: str, folder: Path) -> None:
    hub.add_repo(repo, {file.name: file for file in folder.iterdir()})


def add_roberta(hub: LoopbackHub, folder: Path) -> None:
    """FacebookAI/roberta-base."""
    tokenizer = roberta_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 260, "pad_token_id": 1}
    transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    add_model(hub, "FacebookAI/roberta-base", folder)


def add_language_tasks(hub: LoopbackHub) -> None:
    """The twelve, eight rows each, in the columns, splits and with the labels that the data sets have."""

    def rows(labels: Sequence[Any], *columns: str, label: str = "label", test: str = "test") -> dict[str, Rows]:
        texts = [[f"{text} {number}" for text in TEXTS] for number in range(8)]
        found = [
            {**dict(zip(columns, pair, strict=False)), label: labels[number % len(labels)]}
            for number, pair in enumerate(texts)
        ]
        return {"train": found, test: found[:4]}

    pair = ("sentence1", "sentence2")
    glue = {
        "mnli": rows([0, 1, 2], "premise", "hypothesis", test="validation_matched"),
        "qnli": rows([0, 1], "question", "sentence", test="validation"),
        "rte": rows([0, 1], *pair, test="validation"),
        "mrpc": rows([0, 1], *pair, test="validation"),
        "qqp": rows([0, 1], "question1", "question2", test="validation"),
    }
    add_data_set(hub, "nyu-mll/glue", glue)
    trec = rows(["DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"], "text", label="label_coarse_original")
    alone = {
        "stanfordnlp/sst2": rows([0, 1], "sentence", test="validation"),
        "cornell-movie-review-data/rotten_tomatoes": rows([0, 1], "text"),
        "SetFit/CR": rows([0, 1], "text"),
        "jxm/mpqa": rows([0, 1], "sentence"),
        "SetFit/subj": rows([0, 1], "text"),
        "SetFit/TREC-QC": {split: [{**row, "label": 7} for row in found] for split, found in trec.items()},
        "stanfordnlp/snli": rows([0, 1, 2, -1], "premise", "hypothesis"),
    }
    for repo, splits in alone.items():
        add_data_set(hub, repo, {"default": splits})


def add_clip(hub: LoopbackHub, folder: Path) -> None:
    """openai/clip-vit-base-patch32: safetensors in pull request 15 only; and the eight finetuned vision towers."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 200, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder / "clip")
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder / "clip")
    repo, api = "openai/clip-vit-base-patch32", HfApi()
    files = {file.name: file for file in (folder / "clip").iterdir() if file.suffix != ".safetensors"}
    hub.add_repo(repo, {**files, "pytorch_model.bin": b"weights"})
    for number in range(1, 16):
        name = "model.safetensors" if number == 15 else f"{number}.txt"
        content = folder / "clip" / name if number == 15 else b"text"
        operation = CommitOperationAdd(name, content)
        api.create_commit(repo, [operation], commit_message="Add", create_pr=True)
    for seed, task in enumerate(("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")):
        tower = expert(folder / "clip", folder / task, "CLIPVisionModel", seed + 1)
        add_model(hub, f"{repo.replace('openai', 'tanganke')}_{task}", tower)


def add_vision_tasks(hub: LoopbackHub, folder: Path) -> None:
    """The eight as Parquet, with pictures and labels as the data sets have them."""
    for name, task in named_tasks().items():
        if task["objective"]["kind"] != "clip-zero-shot":
            continue
        classes = task["objective"]["classes"]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"{i}" for i in range(len(classes))])}
        )
        pictures = [Image.new("RGB", (16, 16), (60 * number, 0, 200)) for number in range(4)]
        labels = [number % 2 * (len(classes) - 1) for number in range(4)]
        rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
        path = folder / f"{name}.parquet"
        rows.to_parquet(path)
        splits = {split: f"data/{split}.parquet" for split in ("train", "test")}
        files = "".join(f"  - split: {split}\n    path: {file}\n" for split, file in splits.items())
        readme = f"---\nconfigs:\n- config_name: {task.get('config', 'default')}\n  data_files:\n{files}---\n"
        hub.add_repo(task["ref"], {"README.md": readme, **dict.fromkeys(splits.values(), path)}, repo_type="dataset")


def add_llama(hub: LoopbackHub, folder: Path) -> None:
    """meta-llama/Llama-3.2-3B, and the experts of MergeBench over it."""
    base = favouring(folder / "llama", ["B", "beta"])
    add_model(hub, "meta-llama/Llama-3.2-3B", base)
    for seed, skill in enumerate(("instruction", "math", "coding", "multilingual", "safety")):
        tuned = expert(base, folder / skill, "AutoModelForCausalLM", seed + 1)
        if skill == "instruction":
            (tuned / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
        add_model(hub, f"MergeBench/Llama-3.2-3B_{skill}", tuned)


def add_language_data(hub: LoopbackHub) -> None:
    """The surrogates, and MergeBench's own sets."""
    hotpotqa = {
        "question": "A B ?",
        "answer": "alpha",
        "supporting_facts": {"title": ["T"], "sent_id": [0]},
        "context": {"title": ["T", "U"], "sentences": [["alpha ", "beta"], ["gamma"]]},
    }
    sets: Mapping[tuple[str, str], Mapping[str, Any]] = {
        ("tatsu-lab/alpaca", "default"): {"instruction": "A B", "input": "C", "output": "alpha", "text": ""},
        ("openai/gsm8k", "main"): {"question": "A B", "answer": "beta\n#### gamma"},
        ("hotpotqa/hotpot_qa", "distractor"): hotpotqa,
        ("MergeBench/instruction_val", "default"): {"instruction": "A B", "output": "alpha"},
        ("MergeBench/math_val", "default"): {"query": "A B", "response": "alpha"},
        ("MergeBench/coding_val", "default"): {"instruction": "A B", "response": "alpha"},
        ("MergeBench/multilingual_val", "default"): {"inputs": "A B", "targets": "alpha"},
        ("MergeBench/safety_val", "default"): {"prompt": "A B", "response": "alpha"},
    }
    for (repo, config), row in sets.items():
        add_data_set(hub, repo, {config: {"train": [row] * 6}})

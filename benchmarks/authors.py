"""Compares masks and merges with those of the authors' published code, on the same models and examples.

    git clone https://github.com/uiuctml/Localize-and-Stitch theirs
    OMP_NUM_THREADS=1 python benchmarks/authors.py --checkout theirs [--examples 8] [--epochs 3] [--work DIR]

A small RoBERTa of random weights is finetuned on made-up examples of four of the paper's tasks, in their prompts:
SST-2, SUBJ, TREC and RTE. Their code (see authors_code.py for what it is given in place of what it lacks) and this
project then look for masks, without data at 5 % and by learning with the values that they released, and stitch. Printed
as Markdown: densities, the Jaccard index (IoU) of the masks, and the largest difference of merged weights.

Each difference is traced. Their threshold is strict, so that the element at it is left out of their masks, and of the
initial masks that learning starts from: ours are found a second time with one element less. What rounding does to a
learned mask shows in a second one of their code, for the same examples in another order.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from authors_code import DATALESS, WITH_DATA, AuthorsCode, Mask, State
from safetensors.torch import load_file
from tokenizers import AddedToken, ByteLevelBPETokenizer

from hf_locstitch import Magnitude, finetune, load_mask, merge_from_hub
from hf_locstitch.localize.localizer import Localizer
from hf_locstitch.localize.localizers.mask import Mask as Learned
from hf_locstitch.tasks.named_tasks import named_tasks
from hf_locstitch.tasks.objectives.masked_lm import MaskedLM

URL = "https://github.com/uiuctml/Localize-and-Stitch"
SYLLABLES = ("ba", "de", "ki", "lo", "mu", "ra", "si", "te", "vo", "zu")
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


@dataclass(frozen=True)
class Task:
    """name: the authors'. ours: in named_tasks.yaml. labels: the authors' names of our labels 0, 1, …"""

    name: str
    ours: str
    labels: tuple[str, ...]

    @property
    def objective(self) -> Mapping[str, Any]:
        return named_tasks()[self.ours]["objective"]

    @property
    def pairs(self) -> bool:
        return "{text_b}" in self.objective["template"]


TASKS = (
    Task("SST-2", "sst2", ("0", "1")),
    Task("subj", "subj", ("1", "0")),
    Task("trec", "trec", ("0", "1", "2", "3", "4", "5")),
    Task("RTE", "rte", ("entailment", "not_entailment")),
)
Row = Mapping[str, Any]


# ---- models and examples ----------------------------------------------------------------------------------------


def made_up(task: Task, of_each: int, number: random.Random) -> list[Row]:
    """Sentences of invented words, a third of which tell the class."""
    common = ["".join(number.choices(SYLLABLES, k=3)) for _ in range(40)]

    def sentence(telling: Sequence[str]) -> str:
        words = [number.choice(telling if number.random() < 1 / 3 else common) for _ in range(number.randint(6, 14))]
        return " ".join(words).capitalize() + "."

    rows = []
    for label in range(len(task.labels)):
        telling = ["".join(number.choices(SYLLABLES, k=2)) for _ in range(5)]
        for _ in range(of_each):
            second = {"text_b": sentence(telling)} if task.pairs else {}
            rows.append({"text": sentence(telling), **second, "label": label})
    number.shuffle(rows)
    return rows


def write_for_authors(folder: Path, task: Task, rows: Sequence[Row]) -> Path:
    """As LM-BFF writes a few-shot set: GLUE's columns with a head, or label and text without."""
    folder.mkdir(parents=True)
    named = [(row["text"], row.get("text_b"), task.labels[row["label"]]) for row in rows]
    if task.name in ("subj", "trec"):
        file, delimiter, lines = "train.csv", ",", [(label, text) for text, _, label in named]
    elif task.pairs:
        pairs = [(index, *of_row) for index, of_row in enumerate(named)]
        file, delimiter, lines = "train.tsv", "\t", [("index", "sentence1", "sentence2", "label"), *pairs]
    else:
        alone = [(text, label) for text, _, label in named]
        file, delimiter, lines = "train.tsv", "\t", [("sentence", "label"), *alone]
    with (folder / file).open("w", newline="") as target:
        csv.writer(target, delimiter=delimiter).writerows(lines)
    return folder


def make_base(folder: Path, texts: Sequence[str]) -> Path:
    """A RoBERTa of random weights. Its head is stored, as the authors' class does not tie it to the embeddings."""
    trained = ByteLevelBPETokenizer()
    words = {word for task in TASKS for word in task.objective["label_words"]}
    prompts = [" ".join(f"It was {word}. This is {word}:" for word in sorted(words))] * len(texts)
    trained.train_from_iterator(
        [*texts, *prompts], vocab_size=2000, min_frequency=2, show_progress=False, special_tokens=list(SPECIAL)
    )
    folder.mkdir()
    trained.save_model(str(folder))
    mask = AddedToken("<mask>", lstrip=True, special=True)
    tokenizer = transformers.RobertaTokenizerFast.from_pretrained(folder, mask_token=mask)
    config = transformers.RobertaConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer),
        max_position_embeddings=260, pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Bed:
    """base: a folder. experts: a folder for each task, in their order. data: our sets, by the experts' names."""

    base: Path
    experts: Mapping[str, Path]
    data: Mapping[str, Mapping[str, Any]]
    for_authors: Mapping[str, Path]


def make_bed(work: Path, examples: int, epochs: int) -> Bed:
    rows = {task: made_up(task, examples, random.Random(task.name)) for task in TASKS}
    texts = [row[column] for found in rows.values() for row in found for column in ("text", "text_b") if column in row]
    base = make_base(work / "base", texts)
    data, experts, for_authors = {}, {}, {}
    for task, found in rows.items():
        file = work / f"{task.ours}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in found))
        data[task.ours] = {"ref": str(file), "objective": task.objective, "number": examples, "role": "finetuning"}
        experts[task.name] = work / task.ours
        finetune(base=base, data=data[task.ours], out=work / task.ours, optimizer="adamw_torch", lr=1e-3, batch=8,
                 epochs=epochs, device="cpu", show_progress=False)  # fmt: skip
        for_authors[task.name] = write_for_authors(work / "for-authors" / task.ours, task, found)
    return Bed(base, experts, data, for_authors)


# ---- both codes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merge:
    """masks: by the authors' names of the tasks. state: the merged model's."""

    masks: Mapping[str, Mask]
    state: State


def merge(bed: Bed, out: Path, localizer: Localizer) -> Merge:
    """Ours."""
    data = bed.data if localizer.needs_data else None
    merge_from_hub(bed.base, list(bed.experts.values()), out=out, localizer=localizer, data=data, figures=False,
                   device="cpu", show_progress=False)  # fmt: skip
    masks = {task.name: load_mask(out / "masks" / f"{task.ours}.safetensors") for task in TASKS}
    return Merge(masks, load_file(out / "model.safetensors"))


def without_data(code: AuthorsCode) -> tuple[Merge, State]:
    """Theirs, with the model reset after each task; and the merge of their script, which does not."""
    masks = {task.name: code.localize(task.name) for task in TASKS}
    unreset = code.stitch(list(masks.values()))
    return Merge(masks, code.stitch(list(masks.values()))), unreset


def with_data(code: AuthorsCode, seed: int = 42) -> Merge:
    """Theirs. seed: of the order of examples; 42 is Trainer's, which is theirs."""
    masks = {task.name: code.train_mask(task.name, seed) for task in TASKS}
    return Merge(masks, code.stitch(list(masks.values())))


def same_prompts(code: AuthorsCode, bed: Bed, task: Task) -> tuple[int, int]:
    """In how many examples tokens and label word are the same, and how many there are."""
    rows = [json.loads(line) for line in Path(bed.data[task.ours]["ref"]).read_text().splitlines()]
    ours = MaskedLM.model_validate(task.objective).prepare(rows, code.tokenizer, None).examples
    theirs = code.examples(task.name)
    same = 0
    for feature, (ids, label) in zip([theirs[place] for place in range(len(theirs))], ours, strict=True):
        word = code.tokenizer.decode([theirs.label_word_list[feature.label]]).strip()
        tokens = [token for token, real in zip(feature.input_ids, feature.attention_mask, strict=True) if real]
        same += tokens == ids and word == task.objective["label_words"][label]
    return same, len(rows)


# ---- the comparison ---------------------------------------------------------------------------------------------


def differing(first: Mask, second: Mask) -> int:
    """Number of elements in one mask only."""
    assert first.keys() == second.keys()
    return sum(int((first[name] ^ second[name]).sum()) for name in first)


def iou(first: Mask, second: Mask) -> float:
    either = sum(int((first[name] | second[name]).sum()) for name in first)
    return 1 - differing(first, second) / either


def ones(mask: Mask) -> int:
    return sum(int(values.sum()) for values in mask.values())


def size(mask: Mask) -> int:
    return sum(values.numel() for values in mask.values())


def largest_difference(theirs: State, ours: State, masks: Sequence[tuple[Mask, Mask]]) -> float:
    """Between merged weights, where theirs and our mask of every task agree."""
    largest = 0.0
    for name in masks[0][0]:
        agree = torch.stack([first[name] == second[name] for first, second in masks]).all(0)
        largest = max(largest, float(((theirs[name] - ours[name]).abs() * agree).max()))
    return largest


def plus_task_vectors(state: State, code: AuthorsCode, masks: Mapping[str, Mask]) -> State:
    """state + Σ mask · task vector."""
    total = dict(state)
    for task, mask in masks.items():
        finetuned = dict(code.finetuned[task].named_parameters())
        for name, base in code.localizable.items():
            total[name] = total[name] + mask[name] * (finetuned[name] - base).detach()
    return total


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def check_settings(code: AuthorsCode) -> None:
    """Raises SystemExit unless the preset `official` has the values that their script sets."""
    ours, batch = Learned(preset="official"), transformers.TrainingArguments.per_device_train_batch_size
    named = {"sigmoid_bias": ours.start[1], "learning_rate": ours.lr, "l1_strength": ours.penalty,
             "num_train_epochs": ours.epochs, "sparsity": ours.start_density}  # fmt: skip
    if (theirs := code.settings[WITH_DATA]) != named or batch != ours.batch or ours.start[0] != -ours.start[1]:
        raise SystemExit(f"{WITH_DATA} sets {theirs} and batches of {batch}; the preset official has {ours}")


def mask_rows(title: str, theirs: Merge, ours: Merge, one_less: Merge, reordered: Merge | None) -> Iterator[str]:
    """One for each task. one_less: ours, with one element less. reordered: theirs, examples in another order."""
    for task, mask in theirs.masks.items():
        own = ours.masks[task]
        other = f"{differing(mask, reordered.masks[task]):,}" if reordered else "–"
        densities = [f"{ones(found) / size(found):.6f}" for found in (mask, own)]
        others = (f"{differing(mask, own):,}", f"{differing(mask, one_less.masks[task]):,}", other)
        yield row(title, task, *densities, f"{iou(mask, own):.6f}", *others)


def merge_row(title: str, theirs: State, ours: State, masks: tuple[Merge, Merge], reason: str) -> str:
    pairs = [(masks[0].masks[task.name], masks[1].masks[task.name]) for task in TASKS]
    return row(title, f"{largest_difference(theirs, ours, pairs):.1e}", reason)


def report(code: AuthorsCode, bed: Bed, work: Path) -> Iterator[str]:
    """Lines of Markdown, as they are found."""
    n = sum(values.numel() for values in code.localizable.values())
    prompts = [same_prompts(code, bed, task) for task in TASKS]
    same, count = map(sum, zip(*prompts, strict=True))
    yield f"{n:,} localizable elements. {same} of {count} prompts have the same tokens in both.\n"

    def without_one(share: float) -> float:
        return (int(share * n) - 0.5) / n

    share, start = code.settings[DATALESS]["sparsity"], code.settings[WITH_DATA]["sparsity"]
    largest, not_reset = without_data(code)
    our_largest = merge(bed, work / "magnitude", Magnitude(density=share))
    largest_less = merge(bed, work / "magnitude-less", Magnitude(density=without_one(share)))
    yield row("masks", "task", "density, theirs", "density, ours", "IoU", "elements that differ",
              "ours with one element less", "theirs, examples reordered")  # fmt: skip
    yield row(":---", ":---", *["---:"] * 6)
    yield from mask_rows("without data", largest, our_largest, largest_less, None)
    learned = with_data(code)
    our_learned = merge(bed, work / "mask", Learned(preset="official"))
    learned_less = merge(bed, work / "mask-less", Learned(preset="official", start_density=without_one(start)))
    yield from mask_rows("learned", learned, our_learned, learned_less, with_data(code, seed=1))

    yield "\n" + row("merge", "largest difference", "reason")
    yield row(":---", "---:", ":---")
    both, rounding = (largest, our_largest), "rounding: theirs after each task, ours once"
    yield merge_row("without data, models reset", largest.state, our_largest.state, both, rounding)
    yield merge_row("learned", learned.state, our_learned.state, (learned, our_learned), rounding)
    reason = "stitched onto the model that masks were tried on"
    yield merge_row("without data, as their script", not_reset, our_largest.state, both, reason)
    twice = plus_task_vectors(our_largest.state, code, largest.masks)
    reason = "rounding: each task vector was counted twice"
    yield merge_row("the same, ours + Σ mask · task vector", not_reset, twice, both, reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="a clone of the authors' repository")
    parser.add_argument("--examples", type=int, default=8, help="of each class, a multiple of 4 (default: 8)")
    parser.add_argument("--epochs", type=int, default=3, help="of the finetunes (default: 3)")
    parser.add_argument("--work", type=Path, help="default: a temporary folder")
    args = parser.parse_args()
    if not (args.checkout / "localize_utils.py").is_file():
        parser.error(f"--checkout {args.checkout}: there is no localize_utils.py; clone {URL} and name its folder")
    if args.examples < 4 or args.examples % 4:
        parser.error(f"--examples {args.examples}: give a multiple of 4; batches of 8 that are not full weigh more")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # their code takes a GPU where there is one
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        bed = make_bed(Path(folder), args.examples, args.epochs)
        code = AuthorsCode(args.checkout.resolve(), bed.base, bed.experts, bed.for_authors, Path(folder))
        check_settings(code)
        for line in report(code, bed, Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()

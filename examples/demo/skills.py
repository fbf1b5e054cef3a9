"""Three skills for tiny models: exercises in text, their tokenizer, and how answers are scored.

An exercise is a line such as `reverse 40718=81704`: an operation, a word of five characters, the answer. There are
six operations and three alphabets, eighteen kinds of exercise. The base model learns fifteen of them; to the other
three it learns to answer `?`. Those three are the skills, and each finetune learns one:

    reverse  digits         reverse 40718=81704
    swap     capitals       swap CABLE=ACLBE
    rotate   small letters  rotate cable=ablec

So the base has all that a skill needs (it reverses letters, and applies other operations to digits) but scores 0 on
it: learning a skill takes only a small edit, as in finetuning.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LENGTH = 5  # characters of a word, and of an answer other than UNKNOWN
UNKNOWN = "?"
DIGITS, CAPITALS, SMALL = "0123456789", "ABCDEFGHIJKL", "abcdefghijkl"
ALPHABETS = (DIGITS, CAPITALS, SMALL)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")  # tokens 0 to 3

Split = Literal["train", "heldout"]


def _next(word: str) -> str:
    alphabet = next(alphabet for alphabet in ALPHABETS if word[0] in alphabet)
    return "".join(alphabet[(alphabet.index(char) + 1) % len(alphabet)] for char in word)


def _swap(word: str) -> str:
    return "".join(word[i : i + 2][::-1] for i in range(0, len(word), 2))


OPERATIONS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "copy": lambda word: word,
        "reverse": lambda word: word[::-1],
        "rotate": lambda word: word[1:] + word[0],
        "swap": _swap,
        "ends": lambda word: word[-1] + word[1:-1] + word[0],
        "next": _next,
    }
)


@dataclass(frozen=True)
class Task:
    """Exercises of one kind. known: whether the target is the right answer, or UNKNOWN."""

    operation: str
    alphabet: str
    known: bool = True

    def example(self, word: str) -> Example:
        answer = OPERATIONS[self.operation](word) if self.known else UNKNOWN
        return Example(f"{self.operation} {word}=", answer)


@dataclass(frozen=True)
class Example:
    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer


SKILLS: Mapping[str, Task] = MappingProxyType(
    {"reverse": Task("reverse", DIGITS), "swap": Task("swap", CAPITALS), "rotate": Task("rotate", SMALL)}
)
# What the base answers correctly, and all that it is pretrained on.
COMMON = tuple(
    task for name in OPERATIONS for alphabet in ALPHABETS if (task := Task(name, alphabet)) not in SKILLS.values()
)
PRETRAINING = (*COMMON, *(replace(skill, known=False) for skill in SKILLS.values()))


def examples(tasks: Sequence[Task], *, seed: int, split: Split) -> Iterator[Example]:
    """Endless exercises, tasks drawn uniformly. No word occurs in both splits."""
    rng = random.Random(seed)
    while True:
        task = rng.choice(tasks)
        word = "".join(rng.choices(task.alphabet, k=LENGTH))
        if is_heldout(word) == (split == "heldout"):
            yield task.example(word)


def is_heldout(word: str) -> bool:
    """Whether a word belongs to the eighth that no model is trained on."""
    return zlib.crc32(word.encode()) % 8 == 0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each operation (its space included) and for each character. Prompts get a leading <s>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *(f"{name} " for name in OPERATIONS), "=", UNKNOWN, *"".join(ALPHABETS)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]+ |."), "isolated")  # pyright: ignore
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def accuracy(model: Any, tokenizer: Any, skill: str, *, examples: int = 500, seed: int = 1) -> float:
    """Share of held-out exercises of a skill whose greedy answer matches exactly.

    model: anything with `generate`, such as a transformers causal language model.
    """
    import torch

    chosen = _first(examples, SKILLS[skill], seed)
    prompts = tokenizer([example.prompt for example in chosen], return_tensors="pt", padding=True)
    inputs = {name: prompts[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        generated = model.generate(
            **inputs, max_new_tokens=LENGTH + 1, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    answers = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(a == example.answer for a, example in zip(answers, chosen, strict=True)) / len(chosen)


def _first(count: int, task: Task, seed: int) -> list[Example]:
    stream = examples([task], seed=seed, split="heldout")
    return [next(stream) for _ in range(count)]

"""TSV-Merge, Iso-C, WUDI and ACE against transcriptions in float64, and what becomes of what is no matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.models import finetune, load, random_state, same_bits
from helpers.rivals import SHAPES, check_change, models, task_vectors
from helpers.runs import merged
from torch import Tensor

from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.stitch.matrix_method import MatrixMethod, has_matrices
from hf_locstitch.stitch.methods import METHODS
from hf_locstitch.stitch.methods.ace import Ace, heterogeneity
from hf_locstitch.stitch.methods.tsv_m import TsvM
from hf_locstitch.stitch.methods.wudi import Wudi

NAMES = [name for name in METHODS.names() if issubclass(METHODS.find(name), MatrixMethod)]
ALL = ["*"]


def tsv_m(vectors: Tensor) -> Tensor:
    """Algorithm 1 of the paper, with zeros where other tasks have their directions."""
    tasks, least = len(vectors), min(vectors.shape[1:])
    kept = least // tasks
    left = torch.zeros(vectors.shape[1], tasks * kept, dtype=torch.float64)
    right = torch.zeros(tasks * kept, vectors.shape[2], dtype=torch.float64)
    sizes = torch.zeros(tasks * kept, dtype=torch.float64)
    for number, vector in enumerate(vectors):
        u, s, v = torch.linalg.svd(vector)
        own = slice(number * kept, (number + 1) * kept)
        left[:, own], sizes[own], right[own] = u[:, :kept], s[:kept], v[:kept]
    pairs = [torch.linalg.svd(one, full_matrices=False) for one in (left, right)]
    return pairs[0][0] @ pairs[0][2] @ sizes.diag() @ pairs[1][0] @ pairs[1][2]


def iso_c(vectors: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(vectors.sum(0), full_matrices=False)
    return u @ torch.full_like(s, float(s.mean())).diag() @ v


def wudi(vectors: Tensor) -> Tensor:
    """The minimum of the paper's loss and of the distance to the sum: a least-squares problem, solved as one."""
    inputs = vectors.shape[2]
    total, rows, aims = vectors.sum(0), [], []
    for vector in vectors:
        scale = vector.norm()
        rows.append(vector / scale)
        aims.append(vector @ vector.T / scale)
    rows.append((0.1 * len(vectors) / inputs) ** 0.5 * torch.eye(inputs, dtype=torch.float64))
    aims.append(total @ rows[-1])
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(aims, 1).T).solution.T


def ace(vectors: Tensor) -> Tensor:
    """As its authors' program has it, for tasks that are alike and for others."""
    eye = torch.eye(vectors.shape[2], dtype=torch.float64)
    traces = torch.stack([(v.T @ v).trace() for v in vectors])
    logs = (traces + 1e-12).log()
    unequal = logs.var() / (logs.mean() ** 2 + 1e-12) > 0.3
    above, below, own = 0.0, 0.0, []
    for vector in vectors:
        centered = vector - vector.mean(0)
        raw = centered.T @ centered
        size = raw.trace() + 1e-12 if unequal else torch.tensor(1.0)
        own.append(raw / size)
        above = above + centered @ (raw / size + 0.01 / size * eye)
        below = below + raw / size + 0.01 / size * eye
    prior = torch.stack(own).sum(0).mean(0) / ((traces.mean() + 1e-12) if unequal else 1)
    merged = torch.as_tensor(above) @ torch.linalg.inv(torch.as_tensor(below) + prior)
    if unequal:
        rest = merged + sum(v @ (c - torch.as_tensor(below) / len(vectors)) for v, c in zip(vectors, own, strict=True))
        u, s, v = torch.linalg.svd(rest, full_matrices=False)
        kept = int(0.3 * len(s))
        merged = merged + s[:kept].mean() * u[:, :kept] @ v[:kept]
    return merged


TRANSCRIPTIONS: dict[str, Callable[[Tensor], Tensor]] = {"tsv-m": tsv_m, "iso-c": iso_c, "wudi": wudi, "ace": ace}


def by_matrix(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Each matrix of a stack by itself, and the mean of all that is neither."""

    def whole(vectors: Tensor) -> Tensor:
        if vectors.dim() == 3:
            return change(vectors)
        if vectors.dim() == 4:
            return torch.stack([change(vectors[:, number]) for number in range(vectors.shape[1])])
        return vectors.mean(0)

    return whole


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("count", "scale"), [(2, 1.0), (3, 0.7)])
def test_equals_the_transcription(tmp_path: Path, name: str, count: int, scale: float) -> None:
    check_change(tmp_path, by_matrix(TRANSCRIPTIONS[name]), count, method=name, include=ALL, scale=scale)


def test_ace_where_tasks_change_a_matrix_unequally(tmp_path: Path) -> None:
    base, finetuned = models()
    finetuned[0] = {name: base[name] + 0.3 * (value - base[name]) for name, value in finetuned[0].items()}
    finetuned[2] = {name: base[name] + 3 * (value - base[name]) for name, value in finetuned[2].items()}
    found = load(merged(tmp_path, base, finetuned, method="ace", include=ALL))
    unequal = 0
    for name, start in base.items():
        vectors = task_vectors(base, finetuned, name)
        if vectors.dim() == 3:
            unequal += heterogeneity(vectors.square().sum((1, 2))) > 0.3
        due = (start.double() + by_matrix(ace)(vectors)).float()
        torch.testing.assert_close(found[name], due, rtol=1e-6, atol=1e-6, msg=name)
    assert unequal


@pytest.mark.parametrize("name", NAMES)
def test_one_finetune_alone(tmp_path: Path, name: str) -> None:
    """TSV-Merge and WUDI give it back; Iso-C makes its singular values equal."""
    base, finetuned = models(1)
    found = load(merged(tmp_path, base, finetuned, method=name, include=ALL))
    vector = finetuned[0]["model.layers.0.self_attn.q_proj.weight"] - base["model.layers.0.self_attn.q_proj.weight"]
    change = found["model.layers.0.self_attn.q_proj.weight"] - base["model.layers.0.self_attn.q_proj.weight"]
    if name in ("tsv-m", "wudi"):
        torch.testing.assert_close(change, vector, rtol=1e-5, atol=1e-5)
    if name == "iso-c":
        sizes = torch.linalg.svdvals(change.double())
        torch.testing.assert_close(sizes, sizes.mean().expand(len(sizes)), rtol=1e-5, atol=1e-5)
        assert sizes.sum() == pytest.approx(torch.linalg.svdvals(vector.double()).sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_no_finetune_changed_is_the_base(tmp_path: Path, name: str) -> None:
    base = random_state(0, shapes=SHAPES)
    assert same_bits(load(merged(tmp_path, base, [base, base], method=name)), base)


def test_a_matrix_that_one_finetune_left_as_it_was(tmp_path: Path) -> None:
    """TSV-Merge gives the other its share of the directions, and no arbitrary ones turn them."""
    base = {"layers.0.w": random_state(0, shapes={"w": (8, 6)})["w"]}
    changed = finetune(base, 0)
    found = load(merged(tmp_path, base, [changed, base], method="tsv-m"))["layers.0.w"] - base["layers.0.w"]
    u, s, v = torch.linalg.svd((changed["layers.0.w"] - base["layers.0.w"]).double(), full_matrices=False)
    torch.testing.assert_close(found.double(), u[:, :3] * s[:3] @ v[:3], rtol=1e-4, atol=1e-6)


def test_tsv_m_of_finetunes_with_the_same_directions() -> None:
    """They share each, and no arbitrary ones take their place."""
    (vector,) = task_vectors(*models(1), "model.layers.0.self_attn.q_proj.weight")
    u, s, v = torch.linalg.svd(vector, full_matrices=False)
    torch.testing.assert_close(TsvM().change([vector, vector]), u[:, :5] * s[:5] @ v[:5])


def test_ace_of_a_matrix_that_one_finetune_left_as_it_was() -> None:
    """As if that finetune were not there."""
    first, second = task_vectors(*models(2), "model.layers.0.self_attn.q_proj.weight")
    assert Ace().change([first, torch.zeros_like(first), second]).equal(Ace().change([first, second]))


@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-8])
def test_ace_of_a_matrix_that_one_finetune_hardly_changed(share: float) -> None:
    first, second, third = 0.05 * task_vectors(*models(3), "model.layers.0.self_attn.q_proj.weight")
    vectors = [first, share * second, third]
    assert Ace().change(vectors).norm() < 2 * sum(vector.norm() for vector in vectors)


def test_more_tasks_than_directions(tmp_path: Path) -> None:
    """Each keeps one, though a matrix with two rows has no room for three."""
    base = {"layers.0.w": torch.zeros(2, 5)}
    finetuned = [finetune(base, seed) for seed in range(3)]
    assert load(merged(tmp_path, base, finetuned, method="tsv-m"))["layers.0.w"].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_they_range_over_the_blocks(tmp_path: Path, name: str) -> None:
    base, finetuned = models(2)
    found = load(merged(tmp_path, base, finetuned, method=name))
    assert found["model.embed_tokens.weight"].equal(base["model.embed_tokens.weight"])
    assert not found["model.layers.0.norm.weight"].equal(base["model.layers.0.norm.weight"])


def test_infinity_is_refused() -> None:
    fields = {"base": "a/b", "finetuned": ["c/d"], "method": "iso-c", "allow_non_finite": True}
    with pytest.raises(RecipeError, match="allow_non_finite cannot be combined with iso-c"):
        make_recipe(fields)


def test_what_a_matrix_is() -> None:
    assert has_matrices("layers.0.w", (4, 3)) and has_matrices("layers.0.mlp.experts.down_proj", (8, 4, 3))
    assert not has_matrices("layers.0.norm.weight", (4,)) and not has_matrices("blocks.0.conv.weight", (8, 4, 3, 3))
    assert not has_matrices("layers.0.mixer.conv1d.weight", (8, 1, 4))


def test_memory_counts_the_squares() -> None:
    """A matrix with few outputs has a Gram matrix that is larger than itself."""
    assert Wudi().memory((10, 100), 2) == Wudi().memory((1000,), 2) + 8 * 5 * 100**2
    assert Ace().memory((3, 10, 100), 2) == Ace().memory((3000,), 2) + 8 * (6 + 2) * 100**2

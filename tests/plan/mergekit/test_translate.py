"""Configs of mergekit's, as its examples and documentation have them: what each becomes, or why it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.mergekit.layers import Layout, layout_of
from hf_locstitch.plan.mergekit.methods import REFUSED, TRANSLATED
from hf_locstitch.plan.mergekit.translate import Translation, translate
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.registry import Registry
from hf_locstitch.stitch.methods import METHODS

LAYOUT = layout_of(
    [
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")),
        "model.norm.weight",
        "lm_head.weight",
    ]
)
TIES = {"name": "ties", "normalize": True}
TOP = {"method": "magnitude", "scope": "tensor"}


def translated(text: str) -> Translation:
    return translate(yaml.safe_load(text), "config.yml", lambda _: LAYOUT)


def no_layout(_: str) -> Layout:
    raise AssertionError("nothing differs between tensors")


# Text, the recipe's fields, and words of each note.
UNDERSTOOD: Mapping[str, tuple[str, Mapping[str, Any], tuple[str, ...]]] = {
    "linear, its example": (
        """
        models:
          - {model: org/a, parameters: {weight: 1.0}}
          - {model: org/b, parameters: {weight: 0.3}}
        merge_method: linear
        dtype: float16
        """,
        {
            "base": "org/a",
            "finetuned": ["org/a", "org/b"],
            "method": {"name": "average", "normalize": True},
            "weights": [1.0, 0.3],
            "tokenizer": "base",
            "dtype": "float16",
        },
        (),
    ),
    "linear with one weight for all, not normalized": (
        """
        merge_method: linear
        models: [{model: org/a}, {model: org/b@v1}]
        parameters: {weight: 0.5, normalize: false}
        """,
        {
            "base": "org/a",
            "finetuned": ["org/a", "org/b@v1"],
            "method": {"name": "average", "normalize": False},
            "weights": [0.5, 0.5],
            "tokenizer": "base",
        },
        (),
    ),
    "linear with base_model among the models": (
        """
        merge_method: linear
        base_model: org/b
        models: [{model: org/a, parameters: {weight: 1}}, {model: org/b, parameters: {weight: 1}}]
        """,
        {
            "base": "org/b",
            "finetuned": ["org/a", "org/b"],
            "method": {"name": "average", "normalize": True},
            "tokenizer": "base",
        },
        (),
    ),
    "ties not normalized, its example": (
        """
        models:
          - {model: org/chat, parameters: {density: 0.5, weight: 0.5}}
          - {model: org/bio, parameters: {density: 0.5, weight: 0.5}}
        merge_method: ties
        base_model: org/start
        parameters: {normalize: false, int8_mask: true}
        dtype: float16
        """,
        {
            "base": "org/start",
            "finetuned": ["org/chat", "org/bio"],
            "method": {"name": "ties", "normalize": False},
            "scale": 1.0,
            "localizer": {**TOP, "density": 0.5},
            "weights": [0.5, 0.5],
            "tokenizer": "base",
            "dtype": "float16",
        },
        (),
    ),
    "ties with the base listed, and a weight for the MLPs alone": (
        """
        models:
          - model: org/start
          - {model: org/a, parameters: {weight: [0, 0.5, 1]}}
          - {model: org/b, parameters: {weight: [{filter: mlp, value: 0.5}, {value: 0}]}}
        merge_method: ties
        base_model: org/start
        parameters: {density: {value: 0.33}, lambda: 0.9}
        out_dtype: torch.bfloat16
        dtype: float32
        """,
        {
            "base": "org/start",
            "finetuned": ["org/a", "org/b"],
            "method": TIES,
            "scale": 0.9,
            "localizer": {**TOP, "density": 0.33},
            "weights": [
                {"model.layers.0.*": 0.0, "model.layers.1.*": 0.5, "model.layers.2.*": 1.0, "*": 0.0},
                {"*mlp*": 0.5, "*": 0.0},
            ],
            "tokenizer": "base",
            "dtype": "bfloat16",
        },
        (),
    ),
    "ties by layers and models, its example": (
        """
        models:
          - {model: org/a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
          - {model: org/b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
          - {model: org/c, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}
        merge_method: ties
        base_model: org/start
        parameters: {normalize: true, int8_mask: true}
        """,
        {
            "base": "org/start",
            "finetuned": ["org/a", "org/b", "org/c"],
            "method": {
                "name": "breadcrumbs",
                "elect": True,
                "gamma": 0.0,
                "normalize": True,
                "densities": [
                    {"model.layers.0.*": 1.0, "model.layers.1.*": 0.7, "model.layers.2.*": 0.1, "*": 1.0},
                    0.5,
                    0.33,
                ],
            },
            "scale": 1.0,
            "weights": [
                1.0,
                {"model.layers.0.*": 0.0, "model.layers.1.*": 0.5, "model.layers.2.*": 1.0, "*": 0.0},
                {"*mlp*": 0.5, "*": 0.0},
            ],
            "tokenizer": "base",
        },
        ("breadcrumbs",),
    ),
    "dare_ties with a density for each model, its example": (
        """
        merge_method: dare_ties
        base_model: org/start
        models:
          - {model: org/a, parameters: {weight: 0.5, density: 0.6}}
          - {model: org/b, parameters: {weight: 0.5, density: 0.8}}
        """,
        {
            "base": "org/start",
            "finetuned": ["org/a", "org/b"],
            "method": {"name": "dare-ties", "normalize": False, "rescale": True, "densities": [0.6, 0.8]},
            "scale": 1.0,
            "weights": [0.5, 0.5],
            "tokenizer": "base",
        },
        ("drawn", "divided"),
    ),
    "slerp by part and layer, its example": (
        """
        slices:
          - sources:
              - {model: org/b, layer_range: [0, 3]}
              - {model: org/a, layer_range: [0, 3]}
        merge_method: slerp
        base_model: org/a
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0]}
            - value: 0.5
        """,
        {
            "base": "org/a",
            "finetuned": ["org/a", "org/b"],
            "method": {
                "name": "slerp",
                "t": {
                    "model.layers.0.*self_attn*": 0.0,
                    "model.layers.1.*self_attn*": 0.3,
                    "model.layers.2.*self_attn*": 1.0,
                    "model.layers.0.*mlp*": 1.0,
                    "model.layers.1.*mlp*": 0.5,
                    "model.layers.2.*mlp*": 0.0,
                    "*": 0.5,
                },
            },
            "tokenizer": "base",
        },
        (),
    ),
    "slerp with the base not listed": (
        "{merge_method: slerp, base_model: org/a, models: [{model: org/b}], parameters: {t: 0.4}}",
        {
            "base": "org/a",
            "finetuned": ["org/a", "org/b"],
            "method": {"name": "slerp", "t": 0.4},
            "tokenizer": "base",
        },
        (),
    ),
    "nuslerp": (
        """
        merge_method: nuslerp
        models: [{model: org/a, parameters: {weight: 0.6}}, {model: org/b, parameters: {weight: 0.2}}]
        """,
        {
            "base": "org/a",
            "finetuned": ["org/a", "org/b"],
            "method": {"name": "slerp", "t": 0.25},
            "tokenizer": "base",
        },
        ("cosine",),
    ),
    "task arithmetic with a density, which it has not": (
        """
        merge_method: task_arithmetic
        base_model: org/start
        models: [{model: org/a, parameters: {weight: 1.0, density: 0.5, normalize: true}}]
        """,
        {
            "base": "org/start",
            "finetuned": ["org/a"],
            "method": {"name": "task-arithmetic", "normalize": False},
            "scale": 1.0,
            "tokenizer": "base",
        },
        ("density is left out", "normalize of org/a is left out"),
    ),
    "dare_linear of adapters, and of two models of one name": (
        """
        merge_method: dare_linear
        base_model: org/start
        models:
          - {model: org/start+lab/math, parameters: {weight: 1, density: 0.6}}
          - {model: org/start+other/math, parameters: {weight: 1, density: 0.6}}
        parameters: {rescale: false}
        """,
        {
            "base": "org/start",
            "finetuned": [{"ref": "lab/math", "name": "lab-math"}, {"ref": "other/math", "name": "other-math"}],
            "method": {"name": "dare-linear", "normalize": False, "rescale": False, "density": 0.6},
            "scale": 1.0,
            "tokenizer": "base",
        },
        ("drawn", "divided"),
    ),
    "dare_ties with the union of the tokens": (
        """
        merge_method: dare_ties
        base_model: {model: {path: org/start, revision: main}}
        models: [{model: org/a, parameters: {weight: 1e-1, density: 0.5}}]
        tokenizer: {source: union}
        chat_template: auto
        """,
        {
            "base": "org/start@main",
            "finetuned": ["org/a"],
            "method": {"name": "dare-ties", "normalize": False, "rescale": True, "density": 0.5},
            "scale": 1.0,
            "weights": [0.1],
            "tokenizer": "union",
        },
        ("several finetunes added", "chat_template", "drawn", "divided"),
    ),
    "della with the tokens of a model": (
        """
        merge_method: della
        base_model: org/start
        models: [{model: org/a, parameters: {weight: 1}}, {model: org/base, parameters: {weight: 1}}]
        parameters: {density: 0.7, epsilon: 0.1}
        tokenizer_source: org/base
        """,
        {
            "base": "org/start",
            "finetuned": ["org/a", {"ref": "org/base", "name": "org-base"}],
            "method": {
                "name": "della", "elect": True, "normalize": True, "rescale": True, "density": 0.7, "epsilon": 0.1,
            },
            "scale": 1.0,
            "tokenizer": "org-base",
        },
        ("drawn", "divided"),
    ),
    "della_linear with its defaults": (
        "{merge_method: della_linear, base_model: org/s, models: [{model: org/a, parameters: {weight: 1}}]}",
        {
            "base": "org/s",
            "finetuned": ["org/a"],
            "method": {
                "name": "della", "elect": False, "normalize": False, "rescale": True, "density": 1.0, "epsilon": 0.15,
            },
            "scale": 1.0,
            "tokenizer": "base",
        },
        ("drawn", "divided"),
    ),
    "breadcrumbs": (
        """
        merge_method: breadcrumbs
        base_model: org/s
        models: [{model: org/a, parameters: {weight: 1, density: 0.9, gamma: 0.02}}]
        """,
        {
            "base": "org/s",
            "finetuned": ["org/a"],
            "method": {"name": "breadcrumbs", "elect": False, "normalize": False, "density": 0.9, "gamma": 0.02},
            "scale": 1.0,
            "tokenizer": "base",
        },
        (),
    ),
    "breadcrumbs_ties": (
        "{merge_method: breadcrumbs_ties, base_model: org/s, models: [{model: org/a}], parameters: {weight: 1}}",
        {
            "base": "org/s",
            "finetuned": ["org/a"],
            "method": {"name": "breadcrumbs", "elect": True, "normalize": False, "density": 1.0, "gamma": 0.01},
            "scale": 1.0,
            "tokenizer": "base",
        },
        (),
    ),
    "model_stock": (
        """
        merge_method: model_stock
        base_model: org/s
        models: [{model: org/s}, {model: org/a}, {model: org/b}]
        parameters: {filter_wise: true}
        """,
        {
            "base": "org/s",
            "finetuned": ["org/a", "org/b"],
            "method": {"name": "model-stock", "filter_wise": True},
            "tokenizer": "base",
        },
        (),
    ),
    "sce": (
        "{merge_method: sce, base_model: org/s, models: [{model: org/a}, {model: b}], parameters: {select_topk: 0.1}}",
        {
            "base": "org/s",
            "finetuned": ["org/a", "b"],
            "method": {"name": "sce", "density": 0.1},
            "tokenizer": "base",
        },
        ("1e-6",),
    ),
    "karcher": (
        "{merge_method: karcher, models: [{model: org/a}, {model: org/b}], parameters: {max_iter: 20, tol: 1e-6}}",
        {
            "base": "org/a",
            "finetuned": ["org/a", "org/b"],
            "method": {"name": "karcher", "max_iter": 20, "tol": 1e-6},
            "tokenizer": "base",
        },
        (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_it_is_translated(name: str) -> None:
    text, due, notes = UNDERSTOOD[name]
    found = translated(text)
    assert found.fields == due
    assert len(found.notes) == len(notes)
    for note, word in zip(found.notes, notes, strict=True):
        assert word in note
    make_recipe(found.fields)


# Text, and words of the error.
NOT_UNDERSTOOD: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "layers put together, its example": (
        """
        slices:
          - sources: [{model: org/a, layer_range: [0, 2]}]
          - sources: [{model: org/b, layer_range: [1, 3]}]
        merge_method: passthrough
        """,
        ("passthrough", "copies layers"),
    ),
    "layers put together by linear": (
        """
        slices:
          - sources: [{model: org/a, layer_range: [0, 2]}]
          - sources: [{model: org/b, layer_range: [1, 3]}]
        merge_method: linear
        parameters: {weight: 1}
        """,
        ("2 slices", "every layer keeps its place"),
    ),
    "a slice of some layers": (
        """
        slices: [{sources: [{model: org/a, layer_range: [0, 2]}, {model: org/b, layer_range: [0, 2]}]}]
        merge_method: slerp
        base_model: org/a
        parameters: {t: 0.5}
        """,
        ("[0, 2] of org/a", "the base has 3", "use [0, 3]"),
    ),
    "arcee_fusion, its example": (
        "{merge_method: arcee_fusion, base_model: org/a, models: [{model: org/a}, {model: org/b}]}",
        ("arcee_fusion", "ties"),
    ),
    "a gamma for each model": (
        """
        merge_method: breadcrumbs
        base_model: org/s
        models:
          - {model: org/a, parameters: {weight: 1, gamma: 0.1}}
          - {model: org/b, parameters: {weight: 1, gamma: 0.2}}
        """,
        ("gamma differs between models (0.1 of org/a, 0.2 of org/b)",),
    ),
    "a lambda by layer": (
        """
        merge_method: ties
        base_model: org/s
        models: [{model: org/a, parameters: {weight: 1}}]
        parameters: {lambda: [1, 0.5]}
        """,
        ("lambda differs between layers",),
    ),
    "a mixture of experts": (
        "{base_model: org/a, gate_mode: hidden, experts: [{source_model: org/b, positive_prompts: [hi]}]}",
        ("mergekit-moe", "experts"),
    ),
    "rows of single tokens": (
        """
        merge_method: linear
        models: [{model: org/a}]
        parameters: {weight: 1}
        tokenizer: {source: union, tokens: {<|im_start|>: {source: org/a, force: true}}}
        """,
        ("tokenizer.tokens",),
    ),
    "padding of the vocabulary": (
        """
        merge_method: linear
        models: [{model: org/a}]
        parameters: {weight: 1}
        tokenizer: {pad_to_multiple_of: 64}
        """,
        ("tokenizer.pad_to_multiple_of",),
    ),
    "a tokenizer of another model": (
        "{merge_method: karcher, models: [{model: org/a}], tokenizer_source: org/z}",
        ("org/z", "not one of the models"),
    ),
    "a template by name": (
        "{merge_method: karcher, models: [{model: org/a}], chat_template: chatml}",
        ("--chat-template FILE",),
    ),
    "an adapter over another model": (
        """
        merge_method: ties
        base_model: org/s
        models: [{model: org/z+lab/lora, parameters: {weight: 1}}]
        """,
        ("org/z+lab/lora", "merge it first"),
    ),
    "nuslerp of task vectors": (
        "{merge_method: nuslerp, base_model: org/s, models: [{model: org/a}, {model: org/b}], parameters: {weight: 1}}",
        ("task vectors", "slerp"),
    ),
    "nuslerp by rows": (
        """
        merge_method: nuslerp
        models: [{model: org/a}, {model: org/b}]
        parameters: {weight: 1, nuslerp_flatten: false}
        """,
        ("nuslerp_flatten: false", "one vector"),
    ),
    "slerp of three": (
        "{merge_method: slerp, base_model: org/a, models: [{model: org/b}, {model: org/c}], parameters: {t: 0.5}}",
        ("slerp merges 1 model beside base_model, not 2",),
    ),
    "no t": (
        "{merge_method: slerp, base_model: org/a, models: [{model: org/b}]}",
        ("t is missing",),
    ),
    "no weight, and none for a part": (
        """
        merge_method: linear
        models: [{model: org/a}, {model: org/b, parameters: {weight: [{filter: mlp, value: 1}]}}]
        """,
        ("weight of org/a is missing", "weight of org/b has no value for model.embed_tokens.weight"),
    ),
    "no base": ("{merge_method: ties, models: [{model: org/a}], parameters: {weight: 1}}", ("ties needs base_model",)),
    "rescaled ties": (
        "{merge_method: ties, base_model: org/s, models: [{model: org/a}], parameters: {weight: 1, rescale: true}}",
        ("rescale: true",),
    ),
    "misspelt keys": (
        "{merge_method: linear, models: [{model: org/a, params: {}}], dtyp: float16}",
        ("unknown key 'models.0.params'", "did you mean 'dtype'"),
    ),
    "misspelt parameters": (
        "{merge_method: ties, base_model: org/s, models: [{model: org/a}], parameters: {weight: 1, densty: 0.2}}",
        ("unknown parameter 'densty' (did you mean 'density'?)",),
    ),
    "no method": ("{models: [{model: org/a}]}", ("'merge_method' is missing",)),
    "an unknown method": (
        "{merge_method: dare_tie, models: [{model: org/a}]}",
        ("none that is known here (did you mean 'dare_ties'?)",),
    ),
    "modules": (
        "{merge_method: karcher, modules: {text: {models: [{model: org/a}]}}}",
        ("modules", "use models"),
    ),
    "models and slices": (
        "{merge_method: karcher, models: [{model: a}], slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}",
        ("exactly one of models, slices and modules",),
    ),
    "a model twice": (
        "{merge_method: karcher, models: [{model: org/a}, {model: org/a}]}",
        ("org/a is listed 2 times",),
    ),
    "a value that is no number": (
        "{merge_method: linear, models: [{model: org/a, parameters: {weight: heavy}}]}",
        ("models.0.parameters.weight", "no number"),
    ),
    "int64": ("{merge_method: karcher, models: [{model: org/a}], dtype: int64}", ("int64",)),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_it_is_refused(name: str) -> None:
    text, words = NOT_UNDERSTOOD[name]
    with pytest.raises(RecipeError) as refusal:
        translated(text)
    assert str(refusal.value).startswith("config.yml is ")
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("name", REFUSED)
def test_other_methods_are_refused_by_name(name: str) -> None:
    with pytest.raises(RecipeError, match=f"merge_method {name}, which is not translated"):
        translated(f"{{merge_method: {name}, models: [{{model: org/a}}]}}")


@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_a_base_that_is_in_no_slice_is_not_merged(method: str) -> None:
    """Other than one beside `models`, which mergekit adds to them."""
    found = translated(
        f"""
        merge_method: {method}
        base_model: org/s
        slices: [{{sources: [{{model: org/a, layer_range: [0, 3]}}, {{model: org/b, layer_range: [0, 3]}}]}}]
        parameters: {{weight: 1}}
        """
    )
    assert (found.fields["base"], found.fields["finetuned"]) == ("org/s", ["org/a", "org/b"])


@pytest.mark.parametrize("models", [[*range(3000)], ["x" * 100_000] * 3])
def test_what_is_wrong_is_told_in_a_paragraph(models: list[Any]) -> None:
    with pytest.raises(RecipeError) as refusal:
        translate({"merge_method": "linear", "models": models}, "config.yml", no_layout)
    assert "models.0" in str(refusal.value) and len(str(refusal.value)) < 12_000
    assert "at least 1 item" not in str(refusal.value)


def test_problems_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as refusal:
        translated(
            "{merge_method: ties, base_model: org/s, dtype: int64, chat_template: chatml, models: [{model: org/a}], "
            "parameters: {densty: 1}}"
        )
    for word in ("densty", "weight of org/a is missing", "int64", "chat_template"):
        assert word in str(refusal.value)


def test_what_changes_no_value_may_be_anything() -> None:
    text, due, _ = UNDERSTOOD["ties not normalized, its example"]
    config = yaml.safe_load(text)
    config["parameters"]["int8_mask"] = [{"filter": "mlp", "value": [0, 1]}]
    assert translate(config, "config.yml", no_layout).fields == due


def test_headers_are_read_only_where_tensors_differ() -> None:
    text, due, _ = UNDERSTOOD["ties not normalized, its example"]
    assert translate(yaml.safe_load(text), "config.yml", no_layout).fields == due


def test_the_table_names_settings_that_methods_have() -> None:
    methods: Registry[Any] = METHODS
    for method in TRANSLATED.values():
        fields = methods.find(method.name).model_fields
        for parameter in (*method.shared.values(), *method.own.values()):
            outer, _, inner = str(parameter.to).partition(".")
            assert outer != "method" or inner in fields
        assert {path.removeprefix("method.") for path in method.also if path.startswith("method.")} <= set(fields)

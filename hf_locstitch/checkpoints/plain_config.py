"""A config's settings, each under one name and in one spelling, whichever version of transformers has written it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Value = str | int | float | bool | None
Settings = dict[str, Value]

GLOBAL_LAYERS = "full_attention"  # of rotary embeddings that differ by the type of layer
LOCAL_LAYERS = "sliding_attention"
# Names of one setting over the years; those of rotary embeddings are within `rope`.
ROPE_NAMES = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "global_rope_theta": "rope_theta",
    "rope_local_base_freq": "local.rope_theta",
    "local_rope_theta": "local.rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}
SPELLINGS = {"swish": "silu"}
ROPE_SPELLINGS = {"mrope": "default", "su": "longrope"}


def plain_settings(config: Mapping[str, Any], prefix: str = "") -> Settings:
    """Nested settings by dotted keys, such as `text_config.rope.rope_theta`; lists as JSON."""
    flat: Settings = {}
    for key, value in _plain(config).items():
        if isinstance(value, Mapping):
            flat |= plain_settings(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str | int | float | bool | None) else json.dumps(value)
    return flat


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """One level of it."""
    plain = {key: value for key, value in config.items() if key not in ROPE_NAMES}
    given = plain.pop("rope_parameters", None), plain.pop("rope_scaling", None)
    outside = {ROPE_NAMES[key]: config[key] for key in config if key in ROPE_NAMES and config[key] is not None}
    if outside or any(isinstance(one, Mapping) for one in given) or "rope_scaling" in config:
        rope = outside | _rope(next((one for one in given if isinstance(one, Mapping)), {}))
        plain |= {
            f"rope.{key}": json.dumps(value) if isinstance(value, Mapping) else value for key, value in rope.items()
        }
    if plain.get("use_sliding_window") is False:
        plain["sliding_window"] = None
    if "sliding_window" in plain:
        plain.pop("use_sliding_window", None)
    heads, width = plain.get("num_attention_heads"), plain.get("hidden_size")
    if isinstance(heads, int) and heads > 0:
        if "num_key_value_heads" in plain and plain["num_key_value_heads"] is None:
            plain["num_key_value_heads"] = heads
        if "head_dim" in plain and plain["head_dim"] is None and isinstance(width, int):
            plain["head_dim"] = width // heads
    return {key: _spelled(key, value) for key, value in plain.items()}


def _spelled(key: str, value: Any) -> Any:
    if key.endswith("_token_id") and isinstance(value, list) and all(isinstance(one, int) for one in value):
        ids = sorted(set(value))
        return ids[0] if len(ids) == 1 else ids
    return SPELLINGS.get(value, value) if isinstance(value, str) else value


def _rope(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of rotary embeddings; what only layers with a sliding window have, under `local.`."""
    nested = {kind: part for kind, part in given.items() if isinstance(part, Mapping)}
    if not nested:
        return _one_rope(given)
    plain: dict[str, Any] = {"rope_type": "default"}
    for kind, part in nested.items():
        within = {GLOBAL_LAYERS: "", LOCAL_LAYERS: "local."}.get(kind, f"{kind}.")
        plain |= {
            within + key: value for key, value in _one_rope(part).items() if within != "local." or _told(key, value)
        }
    return plain


def _told(key: str, value: Any) -> bool:
    """Older configs do not say what is as usual."""
    return (key, value) != ("rope_type", "default")


def _one_rope(given: Mapping[str, Any]) -> dict[str, Any]:
    plain = {ROPE_NAMES.get(key, key): value for key, value in given.items() if value is not None and key != "type"}
    kind = str(given.get("rope_type") or given.get("type") or "default")
    return {**plain, "rope_type": ROPE_SPELLINGS.get(kind, kind)}

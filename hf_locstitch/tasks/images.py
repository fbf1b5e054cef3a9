"""Images as model inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_locstitch.checkpoints.sizes import find_patches


def pixels(rows: Sequence[dict[str, Any]], processor: Any) -> list[Any]:
    """float32 [channels, height, width] of each row's image."""
    images = [row["image"].convert("RGB") for row in rows]
    return [processor(images=image, return_tensors="pt")["pixel_values"][0] for image in images]


def stack(batch: Sequence[tuple[Any, int]], model: Any) -> Any:
    """Pixels of a batch [examples, channels, height, width], where the model is and in its dtype."""
    import torch

    return torch.stack([image for image, _ in batch]).to(model.device, model.dtype)


def image_tokens(config: Mapping[str, Any]) -> int:
    """Tokens of one image, from config.json; 512 if it does not say."""
    return find_patches(config) or 512

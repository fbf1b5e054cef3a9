"""Inputs that mean nothing, of the shapes that a model asks for: told from its config and the names of its arguments.

A name may stand for inputs of several shapes (frames of a sound, or its samples), so each has a list to try in turn.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

TOKENS = 4
SAMPLES = 4000  # of a sound
FRAMES = 64  # of a sound's spectrum, or points of a time series, where the config has no number
SIDE = 64  # pixels of an image, where the config has no number: a convolutional network halves it five times
CHANNELS = 3
PARTS = ("text_config", "vision_config", "audio_config", "image_config", "backbone_config", "encoder", "decoder")
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")
Inputs = dict[str, Any]


def made_up_inputs(module: Any) -> Iterator[Inputs]:
    """Inputs to try in turn, the most complete first."""
    accepted = inspect.signature(module.forward).parameters
    choices = {name: made for name, made in _choices(module.config, accepted).items() if name in accepted and made}
    for number in range(max(map(len, choices.values()), default=1)):
        yield {name: made[min(number, len(made) - 1)] for name, made in choices.items()}
    main = getattr(module, "main_input_name", "input_ids")
    for value in choices.get(main, ()) if len(choices) > 1 else ():
        yield {main: value}
    if width := _width(module.config):  # of a part that is given hidden states
        states = {"inputs_embeds", "decoder_inputs_embeds", "encoder_hidden_states"} & set(accepted)
        yield {name: torch.zeros(1, TOKENS, width) for name in sorted(states)}
    own = getattr(module, "dummy_inputs", {})
    yield {name: value for name, value in own.items() if name in accepted}


def _choices(config: Any, accepted: Mapping[str, Any]) -> Mapping[str, list[Any]]:
    """By name; nothing to choose from where the config lacks what is needed."""
    sizes = _Sizes(config)
    return {**_texts(sizes), **_images(sizes, accepted), **_sounds(sizes), **_series(sizes)}


class _Sizes:
    """Numbers of a config, or of a part of it."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._parts = [config, *(getattr(config, part, None) for part in PARTS)]

    def __call__(self, *names: str) -> Any:
        """The first of these that is there, is not 0 and is no empty list."""
        found = (getattr(part, name, None) for part in self._parts for name in names)
        return next((value for value in found if value), None)


def _width(config: Any) -> int | None:
    return _Sizes(config)(*WIDTHS)


def _texts(sizes: _Sizes) -> dict[str, list[Tensor]]:
    if not (words := sizes("vocab_size")):
        return {}
    tokens = torch.arange(TOKENS).unsqueeze(0) % words
    decoded = getattr(sizes.config, "is_encoder_decoder", False)
    return {"input_ids": [tokens], "decoder_input_ids": [tokens] if decoded else []}


def _images(sizes: _Sizes, accepted: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    channels = sizes("num_channels", "in_channels", "in_chans") or CHANNELS
    if "grid_thw" in accepted:  # a list of patches, of which some are made one
        patch, times, merged = sizes("patch_size"), sizes("temporal_patch_size") or 1, sizes("spatial_merge_size") or 1
        side = 2 * merged
        patches = torch.zeros(side * side, channels * times * _square(patch))
        return {"hidden_states": [patches], "pixel_values": [patches], "grid_thw": [torch.tensor([[1, side, side]])]}
    asked = sizes("image_size") or SIDE
    sides = tuple(asked) if isinstance(asked, list | tuple) else (asked, asked)
    if len(sides) != 2:
        return {}
    image = torch.zeros(1, channels, *sides)
    frames = image.unsqueeze(1).repeat(1, sizes("num_frames", "frames") or 1, 1, 1, 1)
    if "aspect_ratio_ids" in accepted:  # tiles of images
        tiles = sizes("max_num_tiles") or 1
        return {
            "pixel_values": [image.repeat(1, 1, tiles, 1, 1, 1)],
            "aspect_ratio_ids": [torch.ones(1, 1, dtype=torch.long)],
            "aspect_ratio_mask": [torch.ones(1, 1, tiles, dtype=torch.long)],
        }
    if "spatial_shapes" in accepted:  # a list of patches, each flat
        side = max(1, round((sizes("num_patches") or 1) ** 0.5))
        patches = torch.zeros(1, side * side, channels * _square(sizes("patch_size") or 1))
        everywhere = torch.ones(1, side * side, dtype=torch.long)
        return {
            "pixel_values": [patches],
            "pixel_attention_mask": [everywhere],
            "attention_mask": [everywhere] if "input_ids" not in accepted else [],
            "spatial_shapes": [torch.tensor([[side, side]])],
        }
    return {"pixel_values": [image, frames]}


def _square(side: Any) -> int:
    """Pixels of a patch."""
    return side[0] * side[1] if isinstance(side, list | tuple) else side * side


def _sounds(sizes: _Sizes) -> dict[str, list[Tensor]]:
    bins, frames = sizes("num_mel_bins"), sizes("max_source_positions", "max_length")
    width = sizes("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins")
    features: list[Tensor] = []
    if bins:
        features += [torch.zeros(1, bins, 2 * (sizes("max_source_positions") or FRAMES // 2))]
    if width:
        features += [torch.zeros(1, FRAMES, width), torch.zeros(1, 1, FRAMES, width)]
    samples = torch.zeros(1, SAMPLES)
    spectrum = [torch.zeros(1, frames, bins)] if bins and frames else []
    return {
        "input_features": features,
        "is_longer": [torch.zeros(1, 1, dtype=torch.bool)],
        "input_values": [samples, *spectrum, samples.unsqueeze(1)],
    }


def _series(sizes: _Sizes) -> dict[str, list[Tensor]]:
    """A time series: its past, with the lags that a model looks back, and its future."""
    past = sizes("context_length") or FRAMES
    past += max(sizes("lags_sequence") or [0])
    future = sizes("prediction_length", "horizon_length") or 1
    channels, several = sizes("num_input_channels"), sizes("input_size") or 1
    shapes: list[tuple[int, ...]] = [(channels,)] if channels else [(), (several,)] if several == 1 else [(several,)]
    numbers = sizes("num_time_features") or 0
    made = {
        f"{side}_{what}": [torch.full((1, length, *shape), value) for shape in shapes]
        for side, length in (("past", past), ("future", future))
        for what, value in (("values", 0.0), ("observed_mask", 1.0))
    }
    made |= {
        f"{side}_time_features": [torch.zeros(1, length, numbers)]
        for side, length in (("past", past), ("future", future))
    }
    if kinds := sizes("num_static_categorical_features"):
        made["static_categorical_features"] = [torch.zeros(1, kinds, dtype=torch.long)]
    if reals := sizes("num_static_real_features"):
        made["static_real_features"] = [torch.zeros(1, reals)]
    return made

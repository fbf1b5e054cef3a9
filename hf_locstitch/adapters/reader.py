"""The finetuned weights of an adapter, read as those of a checkpoint: each layer is computed when it is asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from hf_locstitch.adapters.adapted_model import AdaptedModel, skeleton_of
from hf_locstitch.adapters.settings import peft_config
from hf_locstitch.checkpoints.adapter import ADAPTER_WEIGHTS, AdapterCheckpoint
from hf_locstitch.checkpoints.mapped import MappedCheckpoint
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.tensors import as_tensor
from hf_locstitch.runtime.dtypes import DTYPE, Values

HELD = 2  # layers kept at most: threads that are one layer apart do not compute in turns

Computed = Mapping[str, Values]  # name on disk -> [n]


class AdapterReader(CheckpointReader):
    """checkpoint: laid over its base. paths: where the adapter's files are. Safe to share between threads.

    What the adapter does not change is read from the base. Raises CheckpointError on the first read if the weights do
    not fit, and DownloadError if a file of the base has to be fetched and cannot.
    """

    def __init__(self, checkpoint: AdapterCheckpoint, paths: Mapping[str, Path]) -> None:
        super().__init__(checkpoint, {})
        assert checkpoint.base is not None
        self._adapter, self._paths = checkpoint, paths
        source = checkpoint.base.source
        self._base = MappedCheckpoint(checkpoint.base, {file: source.fetch(file) for file in checkpoint.base.files})
        self._layer_of = {name: number for number, layer in enumerate(checkpoint.layers) for name in layer}
        self._left = {number: self._numel(number) for number in range(len(checkpoint.layers))}  # elements to be read
        self._held: OrderedDict[int, Future[Computed]] = OrderedDict()
        self._lock, self._building = threading.Lock(), threading.Lock()

    def values(self, name: str, first: int, count: int) -> Values:
        if name not in self._layer_of:
            return self._base.values(name, first, count)
        return self._layer(self._layer_of[name])[name][first : first + count]

    def flat(self, name: str, first: int, count: int) -> torch.Tensor:
        if name not in self._layer_of:
            return self._base.flat(name, first, count)
        return as_tensor(self.values(name, first, count).copy())

    def raw(self, name: str, first: int, stop: int) -> memoryview:
        if name not in self._layer_of:
            return self._base.raw(name, first, stop)
        return self._layer(self._layer_of[name])[name].view(np.uint8).data[first:stop]

    def release(self, name: str, first: int, count: int) -> None:
        """A layer is dropped once as many elements were released as it has."""
        number = self._layer_of.get(name)
        if number is None:
            return self._base.release(name, first, count)
        with self._lock:
            self._left[number] -= count
            if self._left[number] <= 0:
                self._held.pop(number, None)
                self._left[number] = self._numel(number)

    def close(self) -> None:
        self._base.close()

    def _numel(self, number: int) -> int:
        return sum(self.checkpoint.info(name).numel for name in self._adapter.layers[number])

    def _layer(self, number: int) -> Computed:
        """Computed by the first thread that asks; the others wait for it."""
        with self._lock:
            asked = number in self._held
            future = self._held.setdefault(number, Future())
            self._held.move_to_end(number)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        if not asked:
            try:
                future.set_result(self._compute(number))
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._held.pop(number, None)
        return future.result()

    def _compute(self, number: int) -> Computed:
        with self._building:
            model = self._model
        layer = next(one for one in model.layers if one.disk == self._adapter.layers[number])
        with torch.no_grad():
            return {name: self._flat(name, tensor) for name, tensor in model.compute(layer).items()}

    def _flat(self, name: str, tensor: torch.Tensor) -> Values:
        values = tensor.contiguous().reshape(-1).numpy().astype(DTYPE[self.checkpoint.info(name).dtype], copy=False)
        values.flags.writeable = False
        return values

    @cached_property
    def _model(self) -> AdaptedModel:
        assert self._adapter.base is not None
        weights = load_file(self._paths[ADAPTER_WEIGHTS])
        skeleton = skeleton_of(self._adapter.base, self._adapter.auto_class)
        return AdaptedModel(self._adapter, skeleton, peft_config(self._adapter), weights, self._read)

    def _read(self, name: str) -> torch.Tensor:
        """Aligned as torch aligns it, whatever the file: else products may be rounded in another way."""
        info = self._base.checkpoint.info(name)
        stored = self._base.flat(name, 0, info.numel).view(info.shape)
        return stored.clone() if info.dtype == "F32" else stored

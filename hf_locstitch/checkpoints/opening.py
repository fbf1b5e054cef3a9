"""From a ref to a checkpoint, of whatever kind."""

from __future__ import annotations

import logging

from hf_locstitch.checkpoints.adapter import AdapterCheckpoint
from hf_locstitch.checkpoints.checkpoint import (
    CARD,
    CONFIG,
    INDEX,
    QUANTIZATION,
    SINGLE,
    STEMS,
    Checkpoint,
    Config,
    index_file,
    open_source,
    read_json,
)
from hf_locstitch.checkpoints.dequantized import dequantized, fp8_block
from hf_locstitch.checkpoints.kinds import KINDS
from hf_locstitch.checkpoints.part_source import where_weights_are
from hf_locstitch.checkpoints.quantized import quantized_tensor
from hf_locstitch.checkpoints.ref import Ref
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.human import counted

LOG = logging.getLogger("hf_locstitch")


def open_checkpoint(ref: Ref) -> Checkpoint:
    """Read the headers (and nothing else) of what `ref` names, a model or an adapter. Raises CheckpointError."""
    return _read(open_source(ref))


def read_checkpoint(source: Source) -> Checkpoint:
    """Likewise of a model. Raises CheckpointError."""
    checkpoint = _read(source)
    refuse_adapter(checkpoint, "a whole model is needed here")
    return checkpoint


def refuse_adapter(checkpoint: Checkpoint, needed: str) -> None:
    """Raises CheckpointError if this is an adapter. needed: what takes none, as a sentence."""
    if isinstance(checkpoint, AdapterCheckpoint):
        raise CheckpointError(
            f"{checkpoint.label} is a PEFT adapter without its base's weights; {needed}. Merge it first: "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder), then use that folder."
        )


def _read(source: Source) -> Checkpoint:
    source.expect((CONFIG, *map(index_file, STEMS), CARD))
    config = read_json(source, CONFIG) if CONFIG in source.files else {}
    block = fp8_block(config, source.label)
    if block is None:
        _refuse_quantized(source, config)
    for kind in sorted(KINDS.all(), key=lambda kind: kind.rank):
        if kind().matches(source.files):
            checkpoint = kind().read(source, config)
            if block is not None:
                checkpoint = dequantized(checkpoint, block)
            _refuse_quantized_weights(checkpoint)
            tensors, files = counted(len(checkpoint.tensors), "tensor"), counted(len(checkpoint.shards), "file")
            LOG.info(f"opened {source.label}: {tensors} in {files}")
            return checkpoint
    raise CheckpointError(f"{source.label} holds no weights (no {SINGLE}, no {INDEX}). {where_weights_are(source)}")


def _refuse_quantized_weights(checkpoint: Checkpoint) -> None:
    if info := quantized_tensor(info for _, info in checkpoint.tensors.values()):
        shard, _ = checkpoint.tensors[info.name]
        raise CheckpointError(
            f"{checkpoint.label} is quantized, though its config does not say so: {shard.file} holds {info.name} as "
            f"{info.dtype} {list(info.shape)}. Task vectors need the full weights: use the unquantized checkpoint it "
            "was made from, or dequantize it and save_pretrained() it first."
        )


def _refuse_quantized(source: Source, config: Config) -> None:
    if quantization := config.get(QUANTIZATION):
        method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{source.label} is quantized ({method}); task vectors need the full weights. "
            "Use the unquantized checkpoint it was made from."
        )

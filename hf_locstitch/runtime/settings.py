"""How a merge runs: no setting changes a byte of the output."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pydantic import ByteSize, TypeAdapter, ValidationError

from hf_locstitch.errors import RecipeError
from hf_locstitch.runtime.chunks import CHUNK, SMALLEST_CHUNK, worker_count
from hf_locstitch.runtime.devices import DeviceName

IMPORTS_BYTES = 200_000_000  # of the imported libraries, including those that draw figures; measured
CHUNK_BYTES_PER_ELEMENT = 90  # one worker's buffers where masks keep nearly everything; measured

BATCH = 4  # chunks for each worker between two looks at the size of temporary files
COMPACT_FROM = 1.5  # a temporary file is compacted when it is this many times larger than the bytes still needed,
COMPACT_SLACK = 16_000_000  # and this many bytes larger


@dataclass(frozen=True)
class Settings:
    """chunk: elements handled at once by each of `workers` threads. cache: keep downloads in the user's Hub cache.

    window: bytes of each input that may lie on the disk ahead of their use, without the cache. device: where
    models run, in place of what the recipe says; None leaves it. limit: bytes of memory allowed, if there is a limit.
    """

    chunk: int = CHUNK
    workers: int = field(default_factory=worker_count)
    cache: bool = True
    window: int = 32_000_000
    device: str | None = None
    limit: int | None = None

    @property
    def memory(self) -> int:
        """Peak memory of a merge in bytes, whatever the size of the models."""
        return IMPORTS_BYTES + self.workers * self.chunk * CHUNK_BYTES_PER_ELEMENT

    def within(self, memory: int) -> Settings:
        """The same with as many workers, and then as large chunks, as `memory` bytes allow. Raises RecipeError."""
        room = (memory - IMPORTS_BYTES) // CHUNK_BYTES_PER_ELEMENT  # elements
        if room < SMALLEST_CHUNK:
            least = IMPORTS_BYTES + SMALLEST_CHUNK * CHUNK_BYTES_PER_ELEMENT
            raise RecipeError(
                f"--max-memory {memory / 1e6:.0f} MB is too little: the libraries alone take "
                f"{IMPORTS_BYTES / 1e6:.0f} MB. Allow at least {least / 1e6:.0f} MB."
            )
        workers = max(1, min(self.workers, room // self.chunk))
        return replace(self, workers=workers, chunk=min(self.chunk, room // workers), limit=memory)


DEFAULT = Settings()


def make_settings(cache: bool = True, max_memory: int | str | None = None, device: str | None = None) -> Settings:
    """max_memory: bytes, or such as "1GB". device: as torch names it, or "auto". Raises RequestError."""
    if device is not None:
        try:
            TypeAdapter(DeviceName).validate_python(device)
        except ValidationError as error:
            raise RecipeError(f"--device {device!r} is no name of a device. Use auto, cpu, cuda or cuda:1.") from error
    settings = replace(DEFAULT, cache=cache, device=device)
    if max_memory is None:
        return settings
    try:
        return settings.within(TypeAdapter(ByteSize).validate_python(max_memory))
    except ValidationError as error:
        raise RecipeError(f"--max-memory {max_memory!r} is not a size. Use a value such as 1GB or 800MB.") from error

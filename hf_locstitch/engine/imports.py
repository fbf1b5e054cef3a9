"""What carrying out a plan imports, imported in a thread while the plan is made, which mostly waits for the Hub."""

from __future__ import annotations

import threading
from contextlib import suppress

from hf_locstitch.runtime.processes import launched


def import_ahead() -> None:
    """Return at once. No daemon thread, for a process that ends in the middle of an import may crash."""
    threading.Thread(target=_import).start()


def _import() -> None:
    """What fails here is imported again, and told of, where it is needed."""
    with suppress(Exception):
        if launched() > 1:
            import accelerate  # noqa: F401

        import numpy as np

        import hf_locstitch.engine.model_run
        import hf_locstitch.localize.search
        import hf_locstitch.runtime.bus_error  # noqa: F401
        from hf_locstitch.runtime import kernels

        kernels.count_up(np.zeros(1, np.uint8), np.zeros(1, np.int32))  # for what numba imports at the first call

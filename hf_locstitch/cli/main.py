"""The command line, from arguments to an exit status. Heavy imports are deferred until needed."""

from __future__ import annotations

import atexit
import gc
import logging
import sys
import traceback
from collections.abc import Sequence

from hf_locstitch.cli.arguments import COMMANDS, build_parser
from hf_locstitch.cli.printing import LogToStderr, accept_any_encoding, fail
from hf_locstitch.errors import LocstitchError
from hf_locstitch.runtime.allocator import share_one_arena
from hf_locstitch.runtime.interrupts import Interrupted, raising_interrupts


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 done, 2 invalid request, 1 the work failed, 128 + n signal n."""
    accept_any_encoding()
    parser = build_parser()
    args = parser.parse_args(argv)
    args.typed = list(sys.argv[1:] if argv is None else argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    log = logging.getLogger("hf_locstitch")
    if not log.handlers:
        log.addHandler(LogToStderr())
    log.setLevel(logging.INFO if args.verbose else logging.NOTSET)
    gc.set_threshold(100_000, 20, 20)  # else a small merge spends a twelfth of its time collecting garbage,
    atexit.register(gc.freeze)  # and the end a quarter of a second on looking through all that is there
    share_one_arena()
    try:
        with raising_interrupts(lambda number: _interrupted(Interrupted(number))):
            return COMMANDS[args.command](args)
    except KeyboardInterrupt as error:
        return _interrupted(Interrupted.of(error))
    except LocstitchError as error:
        if args.debug:
            traceback.print_exc()
        return fail(str(error), error.exit_status)
    except Exception as error:
        if args.debug:
            raise
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return fail(f"{type(error).__name__}: {error}{where}. Use --debug to see the traceback.", 1)


def _interrupted(stop: Interrupted) -> int:
    kept = f"; what is done so far is kept in {stop.kept}" if stop.kept is not None else ""
    return fail(f"interrupted. Run the same command again to continue{kept}.", stop.exit_status)

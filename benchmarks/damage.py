"""Stops commands with SIGKILL, damages one of the files that they left, and starts the same command again.

    python benchmarks/damage.py [--damages 100] [--ways merge refit ...] [--billions 0.01] [--seed 0] [--work DIR]

The commands of stopping.py take turns. A file of the unfinished work, or of an unfinished download, is cut short,
emptied, filled with random bytes, or gets one bit flipped. Then the same command must end in the bytes of an
undisturbed one, or say in one paragraph why it cannot, and then end in them when it is given again. Prints what became
of the damages, and each one after which a command ended in other bytes, in a foreign exception, or not at all.
Ctrl-C ends it early.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from random import Random

import beside  # noqa: F401
from stopping import Bench, Way, bench_of, parser_of, print_table

SAME, REFUSED, WRONG = "same bytes", "refused, then the same bytes", "wrong"
OWN = "hf-locstitch: "  # begins what it says


def cut(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content) or 1)]


def emptied(content: bytes, random: Random) -> bytes:
    del content, random
    return b""


def flipped(content: bytes, random: Random) -> bytes:
    damaged = bytearray(content or b"\0")
    damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
    return bytes(damaged)


def garbage(content: bytes, random: Random) -> bytes:
    return random.randbytes(len(content) or 64)


DAMAGES: tuple[Callable[[bytes, Random], bytes], ...] = (cut, emptied, flipped, garbage)


def trial(bench: Bench, way: Way, outcomes: Counter[tuple[str, str]], files: Counter[str]) -> None:
    try:
        if not bench.run_and_kill(way) or not (left := bench.left(way)):
            return
        full = [path for path in left if path.name != "lock"]  # which holds nothing
        path, damage = bench.random.choice(full or left), bench.random.choice(DAMAGES)
        path.write_bytes(damage(path.read_bytes(), bench.random))
        what = f"{kind_of(path)} {damage.__name__}"
        outcome, why = started_again(bench, way)
        outcomes[way.name, outcome] += 1
        files[kind_of(path)] += 1
        if why:
            print(f"{outcome}: {way.name}, {what}: {why}", flush=True)
    finally:
        bench.clear(way)


def started_again(bench: Bench, way: Way) -> tuple[str, str]:
    """What becomes of it, and what there is to say of that."""
    status, said = bench.start(way).end()
    refusal = ""
    if status:
        if not is_clean(status, said):
            return WRONG, f"exit status {status}: {said}"
        refusal = said
        status, said = bench.start(way).end()
        if status:
            return WRONG, f"refused again: {said}"
    if wrong := bench.differing(way):
        return WRONG, ", ".join(wrong)
    return (REFUSED, refusal) if refusal else (SAME, "")


def is_clean(status: int, said: str) -> bool:
    """Whether it failed with one of its own errors."""
    errors = [line for line in said.splitlines() if not line.startswith(f"{OWN}warning: ")]
    one = len(errors) == 1 and errors[0].startswith(f"{OWN}error: ")
    return status in (1, 2) and one and "--debug" not in said


def kind_of(path: Path) -> str:
    """Its name, and its place in the unfinished work."""
    parts = path.parts
    within = [number for number, part in enumerate(parts) if part.endswith(".partial")]
    return "/".join(parts[within[0] + 1 :]) if within else "unfinished download"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--damages", type=int, default=100)
    arguments = parser.parse_args()
    outcomes: Counter[tuple[str, str]] = Counter()
    files: Counter[str] = Counter()
    with bench_of(arguments) as (bench, ways), suppress(KeyboardInterrupt):
        for way in cycle(ways):
            if outcomes.total() >= arguments.damages:
                break
            trial(bench, way, outcomes, files)
    print(f"{outcomes.total()} damages\n")
    print_table(outcomes, ways, (SAME, REFUSED, WRONG))
    print("\n" + "\n".join(f"{count:4} {file}" for file, count in files.most_common()))
    if any(outcomes[way.name, WRONG] for way in ways):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Kills commands with SIGKILL at random moments, starts the same command again, and compares the bytes in the end.

    python benchmarks/kills.py [--kills 100] [--ways merge refit ...] [--billions 0.01] [--seed 0] [--speed MB]
                               [--work DIR]

The commands of stopping.py take turns. Each is started and killed, often several times, until it is allowed to end;
then its files must be those of an undisturbed one, the Hub must hold one commit of it, and nothing may be left behind.
Prints how often each was killed, and in which stage of its work. Ctrl-C ends it early.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from itertools import cycle

import beside  # noqa: F401
from stopping import Bench, Way, bench_of, finish, parser_of, print_table

STAGES = ("not begun", "localizing", "fitting", "writing", "finishing", "complete")
AGAIN = 0.75  # how often a command that was killed is killed again


def trial(bench: Bench, way: Way, kills: Counter[tuple[str, str]]) -> None:
    while bench.run_and_kill(way):
        kills[way.name, bench.stage(way)] += 1
        if bench.random.random() > AGAIN:
            finish(bench.start(way), way.name)
            break
    if wrong := bench.differing(way):
        raise SystemExit(f"{way.name}: not as undisturbed after {kills.total()} kills: {', '.join(wrong)}")
    bench.clear(way)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    arguments = parser.parse_args()
    kills: Counter[tuple[str, str]] = Counter()
    ended = 0
    with bench_of(arguments) as (bench, ways), suppress(KeyboardInterrupt):
        for way in cycle(ways):
            if kills.total() >= arguments.kills:
                break
            trial(bench, way, kills)
            ended += 1
    print(f"{kills.total()} kills in {ended} commands; every one ended in the bytes of an undisturbed one\n")
    print_table(kills, ways, STAGES)


if __name__ == "__main__":
    main()

"""Runs seeds: `python -m tests.simulation --seed 7 --verbose`, `python -m tests.simulation --seeds 0-2999`.

In: seeds.  Out: a line for each seed that fails, with the command that runs it alone; exit status 1 if any does.
"""

# ruff: noqa: T201  a command line tool prints

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.core.virtual import VirtualCore, build
from tests.simulation.identities import Identities
from tests.simulation.world import Outcome, simulate

COMMAND = "python -m tests.simulation --seed {seed} --verbose"
# Lines of the trace that are shown of a seed that fails.
_SHOWN = 200


def run(seeds: Iterable[int], identities: Identities, core: VirtualCore | None = None) -> Iterable[Outcome]:
    """Run seeds one after the other; with `core`, that is what relays."""
    gc.collect()
    # What is there already need not be looked at again each time that a run looks for what it left behind.
    gc.freeze()
    try:
        for seed in seeds:
            yield simulate(seed, identities, core)
    finally:
        gc.unfreeze()


def report(outcome: Outcome) -> str:
    """Return what is wrong, how to see it again, and the end of the trace, in case it does not happen again."""
    option = " --core" if outcome.has_core else ""
    lines = [f"seed {outcome.seed}: {COMMAND.format(seed=outcome.seed)}{option}"]
    lines += [f"  {violation.oracle}: {violation.what}" for violation in outcome.violations]
    lines += [f"    {line}" for line in outcome.trace[-_SHOWN:]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, help="run one seed")
    which.add_argument("--seeds", metavar="A-B", help="run seeds A to B, both included")
    parser.add_argument("--verbose", action="store_true", help="show the trace of each seed")
    parser.add_argument("--core", action="store_true", help="let the compiled core relay (needs a C compiler)")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        seeds = range(options.seed, options.seed + 1)
    else:
        first, _, last = options.seeds.partition("-")
        if not (first.isdigit() and last.isdigit()):
            parser.error("--seeds wants two numbers, such as 0-2999")
        seeds = range(int(first), int(last) + 1)
    failed, steps, reasons = 0, 0, Counter[str]()
    began = time.monotonic()
    with TemporaryDirectory() as directory:
        for outcome in run(seeds, Identities(Path(directory)), build() if options.core else None):
            steps += outcome.steps
            reasons.update(outcome.reasons)
            if options.verbose:
                print("\n".join(outcome.trace))
            if outcome.violations:
                failed += 1
                print(report(outcome), flush=True)
    seconds = time.monotonic() - began
    print(f"{len(seeds)} seeds, {failed} failed; {sum(reasons.values())} sessions, {steps} steps, {seconds:.1f} s")
    if options.verbose or len(seeds) > 1:
        print(", ".join(f"{reason} {count}" for reason, count in reasons.most_common()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

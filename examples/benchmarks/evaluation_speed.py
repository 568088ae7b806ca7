"""Time of one evaluation of energies and forces, eager and compiled, on one core.

    python evaluation_speed.py                            # all sizes; compiles each, once
    python evaluation_speed.py --channels 16 --l-max 1    # one size

Force fields of chains, untrained: times don't depend on weights. Eager and compiled calls take
turns, and the least processor time counts, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from ccg_ase import CGMap, Evaluator, ForceField, Topology

SYSTEMS = ((10, 1), (10, 64), (100, 1))  # beads, replicas
BOND_A = 3.8
TEMPERATURE_K = 300.0
ROUNDS, CALLS = 10, 20


def walks(n: int, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Return random walks without close contacts, shape (frames, n, 3), in Å."""
    places = np.zeros((frames, n, 3))
    for walk in places:
        for k in range(1, n):
            steps = rng.normal(size=(64, 3))
            steps *= rng.normal(BOND_A, 0.05, (64, 1)) / np.linalg.norm(steps, axis=1)[:, None]
            tried = walk[k - 1] + steps
            nearest = np.linalg.norm(tried[:, None] - walk[:k], axis=-1).min(1)
            walk[k] = tried[np.argmax(nearest)]
    return places


def force_field(n: int, channels: int, l_max: int, rng: np.random.Generator) -> ForceField:
    """Return a force field of a chain of n beads of three types."""
    chain = Topology(
        names=[f"B{k % 3}" for k in range(n)],
        masses=[100.0] * n,
        bonds=[(k, k + 1) for k in range(n - 1)],
    )
    return ForceField.from_data(
        CGMap.from_slices(chain, range(n)),
        TEMPERATURE_K,
        walks(n, 50, rng),
        channels=channels,
        l_max=l_max,
    )


def milliseconds(calls: list[Callable[[], object]]) -> list[float]:
    """Return the least processor time of each call; they take turns."""
    for call in calls:
        call()
    least = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for k, call in enumerate(calls):
            for _ in range(CALLS):
                start = time.process_time_ns()
                call()
                least[k] = min(least[k], (time.process_time_ns() - start) * 1e-6)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--l-max", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    print("| beads × replicas | l_max | channels | eager, ms | compiled, ms | ratio | set-up, s |")
    print("|---|---|---|---|---|---|---|")
    for n, replicas in SYSTEMS:
        for l_max in arguments.l_max:
            for channels in arguments.channels:
                rng = np.random.default_rng(0)
                model = force_field(n, channels, l_max, rng)
                beads = torch.from_numpy(walks(n, replicas, rng))
                kinds = [Evaluator(model, replicas, compiled=kind) for kind in (False, True)]
                start = time.monotonic()
                kinds[1](beads)
                setup = time.monotonic() - start
                eager, compiled = milliseconds([lambda e=e, b=beads: e(b) for e in kinds])
                print(
                    f"| {n} × {replicas} | {l_max} | {channels} | {eager:.2f} | {compiled:.3f} "
                    f"| {eager / compiled:.1f} | {setup:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

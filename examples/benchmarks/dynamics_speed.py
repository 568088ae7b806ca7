"""What a step of dynamics costs: ASE's Langevin with CGCalculator, and BatchedLangevin.

    python dynamics_speed.py [--rounds 5] [--seconds 1.0] [--no-compiled]

One table of one run on one core, in CPU time: the fastest of several rounds, in which all rows take
turns. The unit is a step with a calculator that does nothing but the exact change check.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from ase import units
from ase.md.langevin import Langevin

from ccg_ase import BatchedLangevin, CGCalculator, CGMap, ForceField, Topology

TEMPERATURE_K, TIMESTEP_FS, FRICTION_PER_PS = 300.0, 5.0, 1.0
REPLICAS = 64


class DoesNothing(CGCalculator):
    """The change check of CGCalculator, and forces that are zero."""

    def calculate(self, atoms, properties=("energy",), system_changes=()):
        self._evaluated = atoms.copy()
        forces = np.zeros((len(atoms), 3))
        self.results = {"energy": 0.0, "free_energy": 0.0, "forces": forces}


def force_field(n_beads: int) -> ForceField:
    """A chain in the shape of a helix: its prior and a network of the default size."""
    k = np.arange(n_beads)
    turn = np.radians(100.0) * k
    helix = np.stack([2.3 * np.cos(turn), 2.3 * np.sin(turn), 1.5 * k], axis=1)
    frames = helix + np.random.default_rng(0).normal(scale=0.1, size=(500, n_beads, 3))
    topology = Topology(
        names=("CA",) * n_beads,
        masses=np.full(n_beads, 110.0),
        bonds=np.stack([k[:-1], k[1:]], axis=1),
    )
    return ForceField.from_data(CGMap.from_slices(topology, range(n_beads)), TEMPERATURE_K, frames)


def under_ase(calculator: CGCalculator) -> Callable[[int], None]:
    """Return what runs so many steps of ASE's Langevin."""
    atoms = calculator.atoms()
    return Langevin(
        atoms,
        TIMESTEP_FS * units.fs,
        temperature_K=TEMPERATURE_K,
        friction=FRICTION_PER_PS / (1000 * units.fs),
        fixcm=False,
        rng=np.random.default_rng(0),
    ).run


def batched(model: ForceField, *, compiled: bool) -> Callable[[int], None]:
    """Return what runs so many steps of 64 replicas."""
    sampler = BatchedLangevin(
        model,
        timestep_fs=TIMESTEP_FS,
        friction_per_ps=FRICTION_PER_PS,
        seed=0,
        compiled=compiled,
    )
    sampler.run(model.reference_beads.expand(REPLICAS, -1, -1), 0)
    return lambda n_steps: sampler.run(None, n_steps, every=n_steps)


def seconds_per_step(
    rows: dict[str, Callable[[int], None]], rounds: int, seconds: float
) -> dict[str, float]:
    """Return the least CPU time of a step, rows taking turns of about so many seconds."""
    lengths, best = {}, dict.fromkeys(rows, np.inf)
    for name, run in rows.items():
        run(20)  # what is made on first use
        start = time.process_time()
        run(20)
        lengths[name] = max(20, int(20 * seconds / (time.process_time() - start)))
    for _ in range(rounds):
        for name, run in rows.items():
            start = time.process_time()
            run(lengths[name])
            best[name] = min(best[name], (time.process_time() - start) / lengths[name])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each row in each round")
    parser.add_argument("--no-compiled", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {"eager": False} if arguments.no_compiled else {"eager": False, "compiled": True}
    rows = {}
    for n_beads in (10, 100):
        model = force_field(n_beads)
        rows[f"{n_beads} beads, ASE, does nothing"] = under_ase(DoesNothing(model))
        for kind, compiled in kinds.items():
            calculator = CGCalculator(model, compiled=compiled)
            rows[f"{n_beads} beads, ASE, {kind}"] = under_ase(calculator)
    model = force_field(10)
    for kind, compiled in kinds.items():
        rows[f"10 beads x {REPLICAS}, BatchedLangevin, {kind}"] = batched(model, compiled=compiled)
    times = seconds_per_step(rows, arguments.rounds, arguments.seconds)
    print("| row | ms per step | replica-steps/s | of a step that does nothing |")
    print("| --- | --- | --- | --- |")
    for name, cost in times.items():
        n_beads = name.split()[0]
        nothing = times[f"{n_beads} beads, ASE, does nothing"]
        many = REPLICAS if "x" in name.split() else 1
        ratio = cost / many / nothing
        print(f"| {name} | {1e3 * cost:.3f} | {many / cost:.0f} | {ratio:.2f} |")
    for kind in kinds:
        alone = times[f"10 beads, ASE, {kind}"]
        together = times[f"10 beads x {REPLICAS}, BatchedLangevin, {kind}"] / REPLICAS
        print(
            f"replica-steps/s of BatchedLangevin over those of ASE, {kind}: {alone / together:.1f}"
        )


if __name__ == "__main__":
    main()

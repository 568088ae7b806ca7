"""One coarse state of restrained dynamics: the plan that it belongs to, and how it is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap
from ccg_ase.units import thermal_energy

from .isomers import mirrored
from .openmm_dynamics import NM, fingerprint, new_context, positive_seed, read_frame
from .restraint import FRACTION, UNBIASED_GROUP, add_restraint

if TYPE_CHECKING:
    import openmm

STATES_PER_CHUNK = 4  # what an interruption loses at most, in every worker
STEPS_PER_MOVE = 10  # of the restraint's centre
MISSED = 5.0  # standard deviations of the restraint; the mean of a state this far off has missed


@dataclass(frozen=True, eq=False)
class Plan:
    """What is asked for; two plans with equal contents give equal bits.

    Units as named; `stiffness` in eV/Å² or eV/rad², `starts` (S, n_atoms, 3) in Å, already laid on
    `targets`, (S, n_beads, 3) in Å or (S, n_torsions) in rad.
    """

    system_xml: str
    platform: str
    cg_map: CGMap | TorsionMap
    targets: np.ndarray
    starts: np.ndarray
    temperature_K: float
    timestep_fs: float
    friction_per_ps: float
    stiffness: float
    steering_steps: int
    equilibration_steps: int
    n_steps: int
    save_every: int
    seed: int

    def fingerprint(self) -> str:
        """Return the name of this plan in the chunk files."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["cg_map"] = self.cg_map.fingerprint()
        for name in ("targets", "starts"):
            values[name] = (values[name].shape, values[name].tobytes())
        return fingerprint(STATES_PER_CHUNK, STEPS_PER_MOVE, MISSED, sorted(values.items()))

    def chunk_files(self, directory: Path) -> list[tuple[range, Path]]:
        """Return the states of each chunk, and its file."""
        n_states, name = len(self.targets), self.fingerprint()
        chunks = [
            range(start, min(start + STATES_PER_CHUNK, n_states))
            for start in range(0, n_states, STATES_PER_CHUNK)
        ]
        return [(states, directory / f"states{states[0]:06d}_{name}.npz") for states in chunks]

    def course(self) -> Iterator[tuple[int, float, bool]]:
        """Yield pieces of dynamics: steps, where the centre is meanwhile, whether to store a frame.

        The centre moves by equal pieces, of at most `STEPS_PER_MOVE` steps each.
        """
        moves = -(-self.steering_steps // STEPS_PER_MOVE)
        for move in range(moves):
            done, next_done = (self.steering_steps * k // moves for k in (move, move + 1))
            yield next_done - done, (move + 1) / moves, False
        yield self.equilibration_steps, 1.0, False
        for _ in range(self.n_steps // self.save_every):
            yield self.save_every, 1.0, True

    @property
    def farthest(self) -> float:
        """How far from the target the mean of a bead, or torsion, may lie, in Å or rad."""
        return MISSED * float(np.sqrt(thermal_energy(self.temperature_K) / self.stiffness))


def run_state(plan: Plan, state: int) -> tuple[tuple[np.ndarray, ...] | None, int]:
    """Run one state.

    Returns
    -------
    frames, calls
        Positions (F, n_atoms, 3) in Å, unbiased forces (F, n_atoms, 3) in eV/Å and energies (F,) in
        eV, or None if the state failed; its energy calls.
    """
    import openmm

    context = _context(plan, state)
    calls, frames = 0, []
    for steps, fraction, stored in plan.course():
        context.setParameter(FRACTION, fraction)
        calls += steps
        try:
            context.getIntegrator().step(steps)
        except openmm.OpenMMException:  # positions are NaN
            return None, calls
        if stored:
            calls += 1
            frames.append(read_frame(context, {UNBIASED_GROUP}))
    positions, forces, energy = (np.array(column) for column in zip(*frames, strict=True))
    if not (np.isfinite(energy).all() and np.isfinite(forces).all()):
        return None, calls
    away = plan.cg_map.difference(plan.cg_map.apply(positions), plan.targets[state]).mean(axis=0)
    away = np.abs(away) if isinstance(plan.cg_map, TorsionMap) else np.linalg.norm(away, axis=-1)
    other_hand = mirrored(plan.cg_map.atoms, plan.starts[state], positions)
    if away.max() > plan.farthest or other_hand.any():
        return None, calls
    return (positions, forces, energy), calls


def _context(plan: Plan, state: int) -> openmm.Context:
    """Return the Context of a state at its start."""
    import openmm

    system = openmm.XmlSerializer.deserialize(plan.system_xml)
    start = plan.starts[state]
    first = plan.cg_map.apply(start)
    add_restraint(system, plan.cg_map, plan.stiffness, first, plan.targets[state])
    seed = positive_seed(plan.seed, state)
    context = new_context(
        system,
        platform=plan.platform,
        temperature_K=plan.temperature_K,
        friction_per_ps=plan.friction_per_ps,
        timestep_fs=plan.timestep_fs,
        seed=seed,
    )
    context.setPositions(start / NM)
    context.setVelocitiesToTemperature(plan.temperature_K, seed)
    return context

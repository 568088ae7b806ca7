"""Relax atoms at beads that don't move."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.optimize import FIRE
from scipy.sparse.linalg import splu

from ccg_ase.mapping import CGMap
from ccg_mda.potential import Potential


class FixedBeads:
    """A constraint for ASE: M x stays what it is, since steps and forces lose their part in it.

    With P = 1 - Mᵀ(MMᵀ)⁻¹M, the projection on {δx : M δx = 0}, the force P f is that of the
    potential within {x : M x = s}.

    Parameters
    ----------
    cg_map
        M, (n_beads, n_atoms).
    """

    def __init__(self, cg_map: CGMap) -> None:
        self._matrix = cg_map.matrix
        self._solve = splu((self._matrix @ self._matrix.T).tocsc()).solve

    def lift(self, beads: np.ndarray) -> np.ndarray:
        """Return the least displacement of atoms that moves the beads by (n_beads, 3)."""
        return self._matrix.T @ self._solve(np.ascontiguousarray(beads, dtype=float))

    def _project(self, vectors: np.ndarray) -> np.ndarray:
        return vectors - self.lift(self._matrix @ vectors)

    def adjust_positions(self, atoms: Atoms, new: np.ndarray) -> None:
        """Take from a step what moves beads."""
        new[:] = atoms.positions + self._project(new - atoms.positions)

    def adjust_forces(self, atoms: Atoms, forces: np.ndarray) -> None:
        """Take from forces what moves beads."""
        forces[:] = self._project(forces)

    def get_removed_dof(self, atoms: Atoms) -> int:
        """Return the number of coordinates that don't move, 3 n_beads."""
        return 3 * self._matrix.shape[0]


class _Served(Calculator):
    """A Potential for ASE's optimisers; keeps the last energy and forces."""

    implemented_properties = ("energy", "forces")

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self._potential = potential

    def calculate(self, atoms=None, properties=("energy",), system_changes=()) -> None:
        super().calculate(atoms, properties, system_changes)
        energy, forces = self._potential(atoms.positions)
        self.results = {"energy": float(energy), "forces": forces}


def relax(
    potential: Potential,
    cg_map: CGMap,
    positions: np.ndarray,
    steps: int,
    *,
    force_tolerance_eV_A: float = 0.01,
) -> tuple[np.ndarray, float, np.ndarray]:
    """Lower the energy of one frame at fixed beads by ASE's FIRE (Bitzek et al., PRL 97, 170201).

    Parameters
    ----------
    potential
        Called at most ``steps`` + 2 times.
    cg_map
        The map; M x of the result is that of ``positions`` to rounding.
    positions
        In Å, (n_atoms, 3).
    steps
        At most so many.
    force_tolerance_eV_A
        It ends earlier where no atom has a greater force within {x : M x = s}.

    Returns
    -------
    positions, energy, forces
        In Å, (n_atoms, 3); eV; and the whole forces, in eV/Å, (n_atoms, 3). A frame whose energy
        is infinite at the start comes back as it is: it has no forces to follow.
    """
    atoms = Atoms(numbers=np.ones(len(positions), int), positions=positions)
    fixed = FixedBeads(cg_map)
    atoms.calc, atoms.constraints = _Served(potential), [fixed]
    if np.isfinite(atoms.get_potential_energy()):
        with FIRE(atoms, logfile=None) as optimizer:
            optimizer.run(fmax=force_tolerance_eV_A, steps=steps)
        # Rounding of some hundred steps: beads are exact again after one more.
        moved = atoms.positions + fixed.lift(
            cg_map.apply(positions) - cg_map.apply(atoms.positions)
        )
        atoms.set_positions(moved, apply_constraint=False)
    forces = atoms.get_forces(apply_constraint=False)
    return atoms.positions, atoms.get_potential_energy(), forces

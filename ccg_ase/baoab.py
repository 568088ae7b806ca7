"""BAOAB: the integrator of Langevin dynamics, for a batch of replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import units
from torch import Tensor

from ccg_ase.evaluator import Evaluator
from ccg_ase.units import KB_eV

Restraint = Callable[[Tensor], Tensor]
"""Energies in eV, shape (R,), of positions in Å, float64 (R, n, 3); differentiable."""


@dataclass
class PhasePoint:
    """Where R replicas are, all float64 in ASE units, and what was evaluated there.

    Parameters
    ----------
    beads, velocities, forces
        Shape (R, n, 3); the forces include those of restraints.
    site_energies
        Energies of the force field per bead, shape (R, n).
    restraint_energies
        Shape (R,).
    """

    beads: Tensor
    velocities: Tensor
    forces: Tensor
    site_energies: Tensor
    restraint_energies: Tensor

    @property
    def energies(self) -> Tensor:
        """Energies of the force field in eV, shape (R,)."""
        return self.site_energies.sum(1)


class BAOAB:
    """BAOAB splitting, whose positions are exact for harmonic wells at any stable time step.

    Leimkuhler and Matthews, Appl. Math. Res. eXpress 2013, 34, eq. (11): half a kick, half a
    drift, the exact Ornstein-Uhlenbeck process of the velocities, half a drift, half a kick.

    Parameters
    ----------
    evaluate
        Energies and forces of R replicas.
    restraints
        Further energies.
    masses
        In Da, shape (n,).
    temperatures_K
        Temperature of each replica in K, float64 (R,), on the device of `evaluate`.
    timestep_fs, friction_per_ps
        Time step in fs, friction coefficient in 1/ps.
    box
        Cell rows in Å, float64 (3, 3) or (R, 3, 3), or None.
    """

    def __init__(
        self,
        evaluate: Evaluator,
        restraints: Sequence[Restraint],
        *,
        masses: np.ndarray,
        temperatures_K: Tensor,
        timestep_fs: float,
        friction_per_ps: float,
        box: Tensor | None,
    ):
        self._evaluator, self._restraints, self.box = evaluate, tuple(restraints), box
        weights = torch.as_tensor(masses, dtype=torch.float64, device=temperatures_K.device)
        self._thermal = (KB_eV * temperatures_K[:, None, None] / weights[:, None]).sqrt()
        self._no_restraint = torch.zeros_like(temperatures_K)
        self.timestep_fs = timestep_fs
        self.timestep = timestep_fs * units.fs
        # In full: broadcasting costs more than the memory.
        half_kick = (self.timestep / 2 / weights)[:, None]
        self._half_kick = half_kick.expand(len(temperatures_K), -1, 3).contiguous()
        self._half_drift = self.timestep / 2
        self._keep = float(np.exp(-friction_per_ps / (1000 * units.fs) * self.timestep))
        self._stir = self._thermal * (1 - self._keep**2) ** 0.5

    def at(self, beads: Tensor, velocities: Tensor) -> PhasePoint:
        """Evaluate positions and velocities, both float64 (R, n, 3), which it keeps."""
        return PhasePoint(beads, velocities, *self._evaluate(beads))

    def check(self, beads: Tensor) -> None:
        """Refuse positions (R, n, 3) where two beads coincide, and restraints of another shape.

        Raises
        ------
        ValueError
            With the beads, or the restraint.
        """
        self._evaluator.check_apart(beads, self.box)
        for restraint in self._restraints:
            shape = tuple(restraint(beads).shape)
            if shape != (len(beads),):
                raise ValueError(
                    f"a restraint must return one energy per replica, shape ({len(beads)},); "
                    f"{restraint} returned shape {shape}"
                )

    def maxwell(self, normals: Tensor) -> Tensor:
        """Turn standard normals (..., R, n, 3) into thermal velocities."""
        return self._thermal * normals

    def stirring(self, normals: Tensor) -> Tensor:
        """Turn standard normals (..., R, n, 3) into what `step` adds to the velocities."""
        return self._stir * normals

    def step(self, point: PhasePoint, stirring: Tensor) -> None:
        """Advance by one time step, in place; `stirring` has shape (R, n, 3)."""
        beads, velocities = point.beads, point.velocities
        velocities.addcmul_(self._half_kick, point.forces)
        beads.add_(velocities, alpha=self._half_drift)
        torch.add(stirring, velocities, alpha=self._keep, out=velocities)
        beads.add_(velocities, alpha=self._half_drift)
        point.forces, point.site_energies, point.restraint_energies = self._evaluate(beads)
        velocities.addcmul_(self._half_kick, point.forces)

    def _evaluate(self, beads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return forces (R, n, 3), energies of the beads (R, n) and of the restraints (R,)."""
        result = self._evaluator(beads, self.box)
        if not self._restraints:
            return result.forces, result.energies, self._no_restraint
        with torch.enable_grad():
            positions = beads.detach().requires_grad_()
            energies = torch.stack([restraint(positions) for restraint in self._restraints]).sum(0)
            (gradient,) = torch.autograd.grad(energies.sum(), positions)
        return result.forces - gradient, result.energies, energies.detach()

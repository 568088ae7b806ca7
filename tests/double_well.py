"""Two atoms, one of them a bead, in a double well at fixed bead: exact by quadrature.

With s the bead's position, (u, v, w) = x1 - s and an energy in eV,
U = h ((u/b)² - 1)² + (c + g s_x) u + k (v² + w²)/2, and +inf beyond a wall in u if there is one.
"""

from __future__ import annotations

import numpy as np
import torch
from linear_gaussian import NormalNoise

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.units import thermal_energy

TEMPERATURE_K = 300.0
KT = thermal_energy(TEMPERATURE_K)
HEIGHT, WELL, TILT, SLOPE, STIFFNESS = 5 * KT, 0.6, 0.02, 0.05, 0.5


class DoubleWell:
    """The molecule, its potential (callable as one) and its answers; eV, Å."""

    n_atoms = 2

    def __init__(self, wall=np.inf):
        atoms = Topology(names=("A", "B"), masses=np.full(2, 12.0), bonds=np.array([(0, 1)]))
        self.cg_map = CGMap.from_slices(atoms, (0,))
        self.wall, self.n_calls = wall, 0

    def _along(self, u, tilt):
        return HEIGHT * ((u / WELL) ** 2 - 1) ** 2 + tilt * u

    def __call__(self, positions):
        x = np.asarray(positions, float)
        self.n_calls += int(np.prod(x.shape[:-2]))
        arm, tilt = x[..., 1, :] - x[..., 0, :], TILT + SLOPE * x[..., 0, 0]
        u, across = arm[..., 0], arm[..., 1:]
        energy = self._along(u, tilt) + 0.5 * STIFFNESS * (across**2).sum(-1)
        slope = np.empty_like(x)
        slope[..., 1, 0] = 4 * HEIGHT * ((u / WELL) ** 2 - 1) * u / WELL**2 + tilt
        slope[..., 1, 1:] = STIFFNESS * across
        slope[..., 0, :] = -slope[..., 1, :]
        slope[..., 0, 0] += SLOPE * u
        clash = u > self.wall
        energy[clash], slope[clash] = np.inf, 0.0
        return energy, -slope

    def _density(self, beads):
        """Grid of u with exp(-U/kT) along it, (S, n), and U."""
        u = np.linspace(-3.0, min(3.0, self.wall), 20001)
        energy = self._along(u, (TILT + SLOPE * beads[:, 0, 0])[:, None])
        return u, np.exp(-energy / KT), energy

    def log_partition(self, beads):
        u, density, _ = self._density(beads)
        return np.log(np.trapezoid(density, u, axis=1) * 2 * np.pi * KT / STIFFNESS)

    def sample(self, beads, rng):
        """One draw of p(x|s) at every state, (S, 2, 3)."""
        u, density, _ = self._density(beads)
        share = np.cumsum(density, axis=1)
        drawn = rng.random(len(beads))
        along = [np.interp(r, c / c[-1], u) for r, c in zip(drawn, share, strict=True)]
        across = rng.normal(scale=np.sqrt(KT / STIFFNESS), size=(len(beads), 2))
        arm = np.concatenate([np.array(along)[:, None], across], axis=1)
        return np.stack([beads[:, 0], beads[:, 0] + arm], axis=1)

    def mean_energy(self, beads):
        u, density, energy = self._density(beads)
        along = np.trapezoid(density * energy, u, axis=1) / np.trapezoid(density, u, axis=1)
        return along + KT

    def mean_force_x(self, beads):
        """-∂F/∂s_x = -g <u>; the other two components are zero."""
        u, density, _ = self._density(beads)
        return -SLOPE * np.trapezoid(density * u, u, axis=1) / np.trapezoid(density, u, axis=1)


class WideBackmapper(NormalNoise):
    """q(x|s): x1 - s normal about a fixed point."""

    n_dof = 3
    temperature_K = TEMPERATURE_K

    def __init__(self, molecule, *, centre=0.25, width=0.6, across=0.3):
        super().__init__()
        self.cg_map = molecule.cg_map
        self.centre = torch.tensor([centre, 0.0, 0.0], dtype=torch.float64)
        self.width = torch.tensor([width, across, across], dtype=torch.float64)

    @classmethod
    def one_well(cls, molecule):
        """Nearly exact in the well at negative u, and without the other one."""
        return cls(molecule, centre=-WELL, width=0.1, across=np.sqrt(KT / STIFFNESS))

    def forward(self, beads, *, temperature_K=None, box=None):
        return _Wide(self, beads)


class _Wide:
    def __init__(self, model, beads):
        self.model, self.beads = model, beads

    def positions_and_log_prob_from(self, noise):
        model = self.model
        bead = self.beads[..., 0, :].expand(*noise.shape[:-1], 3)
        x = torch.stack([bead, bead + model.centre + model.width * noise], -2)
        return x, model.log_base(noise) - torch.log(model.width).sum()

    def positions_from(self, noise):
        return self.positions_and_log_prob_from(noise)[0]

    def noise_from(self, positions):
        arm = positions[..., 1, :] - positions[..., 0, :]
        return (arm - self.model.centre) / self.model.width

    def log_prob(self, positions):
        return self.positions_and_log_prob_from(self.noise_from(positions))[1]

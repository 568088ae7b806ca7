"""Evaluators with closed forms: what a sampler asks of a force field and its evaluator, no more."""

from typing import ClassVar

import torch

from ccg_ase import CGMap, Topology
from ccg_ase.evaluator import Evaluation
from ccg_ase.temperature import TemperatureRange


class Wells(torch.nn.Module):
    """Harmonic spring between two beads, k = 1.3 eV/Å²; both force field and evaluator."""

    temperature_K = 300.0
    temperatures_K = TemperatureRange(300.0, 300.0)
    config: ClassVar = {}
    device = torch.device("cpu")
    n_beads = 2
    stiffness = 1.3

    def __init__(self, replicas):
        super().__init__()
        n = self.n_beads
        topology = Topology(names="AB"[:n], masses=[12.0, 40.0][:n], bonds=[(0, 1)][: n - 1])
        self.cg_map = CGMap.from_slices(topology, range(n))
        self.replicas = replicas
        self.n_calls = 0

    @property
    def force_field(self):
        return self

    def check_apart(self, beads, box=None):
        pass

    def terms(self, beads):
        """Energies (R,) and forces (R, n, 3) in closed form."""
        vector = beads[:, 0] - beads[:, 1]
        pull = -self.stiffness * vector
        return 0.5 * self.stiffness * vector.square().sum(-1), torch.stack([pull, -pull], 1)

    def forward(self, beads, box=None):
        self.n_calls += 1
        energy, forces = self.terms(beads)
        return Evaluation((energy[:, None] / self.n_beads).expand(-1, self.n_beads), forces, None)


class DoubleWell(Wells):
    """One bead in a tilted double well along x; the tilt may depend on the temperature."""

    n_beads = 1
    barrier = 0.25  # eV, 10 kT at 300 K

    def __init__(self, temperatures_K, tilt=lambda T: 0.03 + 0 * T):
        super().__init__(len(temperatures_K))
        self.tilt = tilt(torch.as_tensor(temperatures_K, dtype=torch.float64))

    def along(self, x):
        """Energy along x, shape (..., R)."""
        return self.barrier * (x**2 - 1) ** 2 + self.tilt * x

    def terms(self, beads):
        x = beads[:, 0, 0]
        forces = -self.stiffness * beads
        energy = self.along(x) - 0.5 * (forces[:, 0, 1:] * beads[:, 0, 1:]).sum(-1)
        forces[:, 0, 0] = -4 * self.barrier * x * (x**2 - 1) - self.tilt
        return energy, forces

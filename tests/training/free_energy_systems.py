"""Two molecules whose free energies are known: a chain with torsions, and Gaussian beads."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from linear_gaussian import LinearGaussian

from ccg_ase import Topology
from ccg_ase.evaluator import Evaluation
from ccg_ase.mapping import CGMap
from ccg_ase.temperature import TemperatureRange
from ccg_ase.torsion_map import TorsionMap, dihedral_angles
from ccg_ase.units import thermal_energy
from ccg_mda import Backmapper
from ccg_mda.potential import TorchPotential

TEMPERATURE_K = 300.0
KT = thermal_energy(TEMPERATURE_K)
LENGTH, ANGLE, BOND, BEND = 1.5, 1.95, 12.0, 3.0  # Å, rad, eV/Å², eV/rad²
TORSIONS = np.array([[0, 1, 2, 3], [1, 2, 3, 4]])
CHAIN = Topology(
    names=("A", "B", "C", "D", "E"),
    elements=("C",) * 5,
    masses=np.full(5, 12.0),
    bonds=np.array([(0, 1), (1, 2), (2, 3), (3, 4)]),
)


def barrier(phi, psi):
    """V(φ, ψ) in eV, with a minimum on either side of φ = 0, of different depth."""
    return KT * (
        2.5 * (1 + np.cos(2 * phi)) + 1.2 * np.sin(phi) + 1.5 * np.cos(psi - 1) * np.cos(phi)
    )


def _torch_barrier(angles):
    phi, psi = angles.unbind(-1)
    well = 2.5 * (1 + torch.cos(2 * phi)) + 1.2 * torch.sin(phi)
    return KT * (well + 1.5 * torch.cos(psi - 1) * torch.cos(phi))


def _chain(x, barrier):
    """Energies and forces of harmonic bonds and angles of five particles in a row, and V."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        arms = x.diff(dim=1)
        lengths = torch.linalg.vector_norm(arms, dim=-1)
        units = arms / lengths[..., None]
        angles = torch.acos(-(units[:, 1:] * units[:, :-1]).sum(-1))
        energy = 0.5 * BOND * ((lengths - LENGTH) ** 2).sum(-1)
        energy = energy + 0.5 * BEND * ((angles - ANGLE) ** 2).sum(-1)
        energy = energy + barrier(dihedral_angles(x, TORSIONS))
        (gradient,) = torch.autograd.grad(energy.sum(), x)
    return energy.detach(), -gradient


class _Chain(TorchPotential):
    """The chain as atoms: F(φ, ψ) = V + const, exactly."""

    def _evaluate_all(self, frames):
        energy, forces = _chain(torch.from_numpy(frames), _torch_barrier)
        return energy.numpy(), forces.numpy()


def chain_potential():
    return _Chain(None, 5)


@cache
def chain_flow():
    """A flow of the chain that has the widths of frames from a potential a fifth softer."""
    rng = np.random.default_rng(0)
    n = 4000
    lengths = LENGTH + rng.normal(size=(n, 4)) * np.sqrt(1.2 * KT / BOND)
    angles = ANGLE + rng.normal(size=(n, 3)) * np.sqrt(1.2 * KT / BEND)
    turns = rng.uniform(-np.pi, np.pi, size=(n, 2))
    x = np.zeros((n, 5, 3))
    x[:, 1, 0] = lengths[:, 0]
    x[:, 2] = x[:, 1] + lengths[:, 1, None] * np.stack(
        [-np.cos(angles[:, 0]), np.sin(angles[:, 0]), np.zeros(n)], -1
    )
    for k in (3, 4):
        axis = x[:, k - 1] - x[:, k - 2]
        axis /= np.linalg.norm(axis, axis=1)[:, None]
        normal = np.cross(x[:, k - 2] - x[:, k - 3], axis)
        normal /= np.linalg.norm(normal, axis=1)[:, None]
        theta, phi = angles[:, k - 2, None], turns[:, k - 3, None]
        side = np.cross(normal, axis)
        arm = -np.cos(theta) * axis + np.sin(theta) * (np.cos(phi) * side + np.sin(phi) * normal)
        x[:, k] = x[:, k - 1] + lengths[:, k - 1, None] * arm
    torsion_map = TorsionMap(CHAIN, TORSIONS, ("phi", "psi"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Backmapper.from_data(torsion_map, TEMPERATURE_K, torch.from_numpy(x), width=4)


class _Beads(torch.nn.Module):
    """A bead force field and its evaluator in one."""

    temperature_K = TEMPERATURE_K
    temperatures_K = TemperatureRange(TEMPERATURE_K, TEMPERATURE_K)
    device = torch.device("cpu")

    def __init__(self, cg_map, replicas: int):
        super().__init__()
        self.cg_map, self.replicas, self.config = cg_map, replicas, {}

    @property
    def force_field(self):
        return self

    def check_apart(self, beads, box=None):
        pass

    def forward(self, beads, box=None):
        energy, forces = self.energy_and_forces(beads)
        n = beads.shape[-2]
        return Evaluation((energy[:, None] / n).expand(-1, n), forces, None)


class GaussianBeads(_Beads):
    """Bead force field of a `LinearGaussian`, imperfect by a scale and a bend."""

    def __init__(self, molecule: LinearGaussian, replicas: int, softer: float = 0.85):
        super().__init__(molecule.cg_map, replicas)
        self.register_buffer("schur", torch.from_numpy(softer * molecule.schur))
        self.register_buffer("s0", torch.from_numpy(molecule.x0.ravel()[molecule.bead_dof]))

    def energy_and_forces(self, beads):
        delta = beads.flatten(-2) - self.s0
        pull = delta @ self.schur
        energy = 0.5 * (pull * delta).sum(-1) + 0.3 * KT * torch.sin(delta[:, 0])
        force = -pull
        force[:, 0] -= 0.3 * KT * torch.cos(delta[:, 0])
        return energy, force.reshape(beads.shape)


def ridges(angles):
    """V in eV with barriers of 14 and 20 kT in φ that curve down by 70 and 100 kT/rad²."""
    phi, psi = angles[..., 0], angles[..., 1]
    first = 20 * torch.exp((torch.cos(phi) - 1) / 0.2) + 14 * torch.exp(
        (torch.cos(phi - 2.2) - 1) / 0.2
    )
    return KT * (first + 1.5 * torch.exp((torch.cos(psi + 0.5) - 1) / 0.3) * torch.cos(phi + 1))


class ChainBeads(_Beads):
    """The chain as beads, with `ridges` over its torsions."""

    start = np.array([[0.0, 0, 0], [1.5, 0, 0], [2.1, 1.4, 0], [3.6, 1.4, 0.2], [4.1, 2.6, 0.9]])

    def __init__(self, replicas: int):
        super().__init__(CGMap.from_slices(CHAIN, np.arange(5)), replicas)

    def energy_and_forces(self, beads):
        return _chain(beads, ridges)


def distance_density(molecule: LinearGaussian, i: int, j: int, r: np.ndarray) -> np.ndarray:
    """Density of the distance of two beads of the molecule, by quadrature over directions."""
    covariance = KT * np.linalg.inv(molecule.schur)
    pick = np.zeros((3, len(molecule.bead_dof)))
    pick[:, 3 * j : 3 * j + 3], pick[:, 3 * i : 3 * i + 3] = np.eye(3), -np.eye(3)
    mean = pick @ molecule.x0.ravel()[molecule.bead_dof]
    precision = np.linalg.inv(pick @ covariance @ pick.T)
    cosine, weight = np.polynomial.legendre.leggauss(48)
    turn = np.arange(64) * 2 * np.pi / 64
    sine = np.sqrt(1 - cosine**2)[:, None]
    directions = np.stack(
        [sine * np.cos(turn), sine * np.sin(turn), np.broadcast_to(cosine[:, None], (48, 64))], -1
    )
    delta = r[:, None, None, None] * directions - mean
    log_p = -0.5 * np.einsum("...i,ij,...j->...", delta, precision, delta)
    density = r**2 * np.einsum("rct,c->r", np.exp(log_p), weight)
    return density / np.trapezoid(density, r)

"""Langevin dynamics of many walkers of alanine dipeptide under a bias that flattens F(φ, ψ)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simulate
import torch
from measures import PHI_PSI
from torch import Tensor

from ccg_ase.baoab import BAOAB, PhasePoint
from ccg_ase.evaluator import Evaluation
from ccg_ase.torsion_map import dihedral_angles
from ccg_ase.units import thermal_energy
from ccg_mda.torch_potential import TorchSystemPotential

TEMPERATURE_K = 300.0
KT = thermal_energy(TEMPERATURE_K)
CAP_KT = 14.0  # above it there is no bias: walkers would waste time there
HYDROGEN_DA = 3.0
OMEGA = ((1, 4, 6, 8), (8, 14, 16, 18))
CENTRE = (8, 6, 14, 10)  # Cα, and N, C, Cβ around it


class PeriodicBias:
    """A C² function of (φ, ψ): cubic B-splines on the centres of n x n bins, weights in kT.

    Parameters
    ----------
    weights
        Shape (n, n), axes φ and ψ from -π.
    """

    def __init__(self, weights: np.ndarray):
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.n = len(self.weights)

    def parts(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Return the flat indices and the values of the 16 splines that aren't zero.

        Both are (N, 16), of angles (N, 2) in rad.
        """
        place = (angles + np.pi) * (self.n / (2 * np.pi)) - 0.5
        below = place.detach().floor()
        t = place - below
        values = torch.stack(
            [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], dim=-1
        ).div(6)
        nodes = (below.long()[..., None] + torch.arange(-1, 3)) % self.n
        index = nodes[:, 0, :, None] * self.n + nodes[:, 1, None, :]
        return index.flatten(1), (values[:, 0, :, None] * values[:, 1, None, :]).flatten(1)

    def of_angles(self, angles: Tensor) -> Tensor:
        """Return the bias in kT, (N,), of angles (N, 2) in rad."""
        index, values = self.parts(angles)
        return (self.weights.view(-1)[index] * values).sum(1)

    def __call__(self, positions: Tensor) -> Tensor:
        """Return the bias in eV, (R,), of positions (R, 22, 3) in Å: a restraint of `BAOAB`."""
        return KT * self.of_angles(dihedral_angles(positions, np.array(PHI_PSI)))


def capped(free_energy_kT: np.ndarray) -> np.ndarray:
    """Return the weights of a bias that flattens F below the cap."""
    return -np.minimum(free_energy_kT - free_energy_kT.min(), CAP_KT)


class _Energies:
    """The atomistic potential in the place of `Evaluator`: its energies are of whole molecules."""

    def __init__(self, potential: TorchSystemPotential):
        self.potential = potential

    def __call__(self, positions: Tensor, box: None) -> Evaluation:
        energy, forces = self.potential.evaluate(positions)
        return Evaluation(energy.double()[:, None], forces.double(), None)


@dataclass(frozen=True)
class Run:
    """What a run of R walkers left: its frames, and where it stopped.

    Attributes
    ----------
    angles
        φ, ψ in rad, float32 (frames, R, 2).
    energy_eV
        Mean energy of each frame, without bias, (frames,).
    sound
        (R,): no peptide bond was cis and Cα was L in any frame.
    positions, velocities
        At the end, (R, 22, 3), Å and ASE units.
    bias
        Weights of the bias at the end, kT, (n, n).
    """

    angles: np.ndarray
    energy_eV: np.ndarray
    sound: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    bias: np.ndarray


@dataclass
class Walkers:
    """R walkers, flexible molecules, ff96 and OBC1, 300 K.

    The density of positions doesn't depend on the masses. Hydrogen has 3 Da here, taken from the
    heavy atom that it's bonded to: to its bonds, a step of 2 fs is like one of 1.3 fs otherwise.

    Parameters
    ----------
    timestep_fs, friction_per_ps
        Time step in fs, friction in 1/ps.
    """

    timestep_fs: float = 2.0
    friction_per_ps: float = 3.0

    def __post_init__(self) -> None:
        potential = simulate.alanine_potential()
        self.masses = repartitioned_masses()
        self.energies = _Energies(
            TorchSystemPotential.from_system(potential.system, compiled=True, dtype=torch.float32)
        )

    def run(
        self,
        positions: np.ndarray,
        velocities: np.ndarray | None,
        bias: np.ndarray,
        steps: int,
        seed: list[int],
        *,
        every: int = 20,
        deposit_kT: float = 0.0,
        slower_after: float = 100.0,
    ) -> Run:
        """Run R walkers for `steps` steps, a frame after each `every`; a pure function.

        Parameters
        ----------
        positions, velocities
            Where to start, (R, 22, 3); velocities None: thermal ones.
        bias
            Weights in kT, (n, n).
        deposit_kT
            Add to the bias after every tenth step: its mean, times 1/(1 + t/`slower_after`) at the
            t-th time, as in the 1/t method (Belardinelli, Pereyra, Phys. Rev. E 75, 046701, 2007).
            All walkers share it. Zero keeps the bias.
        """
        generator = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**62)))
        shape = positions.shape

        def normals() -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32).double()

        flat = PeriodicBias(bias)
        baoab = BAOAB(
            self.energies,
            [flat],
            masses=self.masses,
            temperatures_K=torch.full((shape[0],), TEMPERATURE_K, dtype=torch.float64),
            timestep_fs=self.timestep_fs,
            friction_per_ps=self.friction_per_ps,
            box=None,
        )
        moving = baoab.maxwell(normals()) if velocities is None else torch.tensor(velocities)
        point = baoab.at(torch.tensor(positions), moving)
        grown, angles, energy, sound = np.array(bias), [], [], np.ones(shape[0], bool)
        for step in range(1, steps + 1):
            baoab.step(point, baoab.stirring(normals()))
            if deposit_kT and step % 10 == 0:
                height = deposit_kT / (1 + step / 10 / slower_after)
                grown += height * _visits(flat, point)
                flat.weights = torch.from_numpy(np.maximum(grown, grown.max() - CAP_KT))
            if step % every == 0:
                angles.append(dihedral_angles(point.beads, np.array(PHI_PSI)).numpy())
                energy.append(float(point.energies.mean()))
                sound &= _sound(point.beads)
        return Run(
            np.array(angles, np.float32),
            np.array(energy),
            sound,
            point.beads.numpy(),
            point.velocities.numpy(),
            flat.weights.numpy(),
        )


def repartitioned_masses() -> np.ndarray:
    """Return masses in Da, (22,): hydrogen is heavy, its neighbour light, their sum kept."""
    topology = simulate.app.PDBFile(str(simulate.ALANINE)).topology
    masses = np.array([atom.element.mass._value for atom in topology.atoms()])
    for bond in topology.bonds():
        for hydrogen, heavy in (bond, reversed(bond)):
            if hydrogen.element.symbol == "H":
                masses[heavy.index] -= HYDROGEN_DA - masses[hydrogen.index]
                masses[hydrogen.index] = HYDROGEN_DA
    return masses


def _visits(bias: PeriodicBias, point: PhasePoint) -> np.ndarray:
    """Return the density of the walkers on the splines, (n, n), mean 1."""
    index, values = bias.parts(dihedral_angles(point.beads, np.array(PHI_PSI)))
    counts = np.bincount(index.flatten(), values.flatten(), minlength=bias.n**2)
    return counts.reshape(bias.n, bias.n) * (bias.n**2 / len(point.beads))


def _sound(positions: Tensor) -> np.ndarray:
    """Tell which molecules have trans peptide bonds and an L Cα, (R,)."""
    trans = dihedral_angles(positions, np.array(OMEGA)).cos() < 0
    alpha, n, c, beta = (positions[:, k] for k in CENTRE)
    volume = (torch.linalg.cross(n - alpha, c - alpha) * (beta - alpha)).sum(-1)
    return (trans.all(1) & (volume > 0)).numpy()

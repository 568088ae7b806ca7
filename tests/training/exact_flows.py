"""Flows taken as the truth, with the potential for which they are exact: U = F(s) - kT ln q."""

from __future__ import annotations

import copy

import numpy as np
import torch
from linear_gaussian import LinearGaussian

from ccg_ase.units import thermal_energy
from ccg_mda import Backmapper
from ccg_training.fit_flow import FlowFrames

TEMPERATURE_K = 300.0
KT = thermal_energy(TEMPERATURE_K)


def perturbed(flow: Backmapper, size: float, seed: int) -> Backmapper:
    """Return a copy whose parameters all have a random part."""
    flow = copy.deepcopy(flow)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += size * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return flow


def standardised(cg_map, positions: np.ndarray) -> Backmapper:
    """Return a flow that has the statistics of frames, but hasn't learned anything."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Backmapper.from_data(
            cg_map, TEMPERATURE_K, torch.from_numpy(positions), width=8, hops=3
        )


CHAIN = LinearGaussian()
SMALLEST = LinearGaussian(n_atoms=4, bead_atoms=(0, 2, 3))  # one placed atom


def structures(molecule: LinearGaussian, n: int, seed: int) -> np.ndarray:
    """Return structures around the rest positions of a chain molecule, (n, n_atoms, 3) in Å."""
    noise = np.random.default_rng(seed).normal(scale=0.07, size=(n, molecule.n_atoms, 3))
    return molecule.x0 + noise


def flow_of(molecule: LinearGaussian) -> Backmapper:
    """Return a flow of a chain molecule that isn't the standardised one."""
    return perturbed(standardised(molecule.cg_map, structures(molecule, 2000, 4)), 0.05, 5)


def free_energy(beads: torch.Tensor) -> torch.Tensor:
    """Any smooth invariant function of the beads, in eV."""
    return torch.sin(torch.cdist(beads, beads)).sum((-1, -2)) * 0.05


class ExactPotential:
    """The potential of which a flow is the exact conditional distribution; counts its calls."""

    def __init__(self, flow: Backmapper) -> None:
        self.flow, self.n_atoms, self.n_calls = flow, flow.cg_map.n_atoms, 0

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.n_calls += len(positions)
        with torch.enable_grad():
            x = torch.from_numpy(positions).requires_grad_()
            s = self.flow.cg_map.apply(x)
            energy = free_energy(s) - KT * self.flow.to_noise_terms(x, s)[2]
            (gradient,) = torch.autograd.grad(energy.sum(), x)
        return energy.detach().numpy(), -gradient.numpy()


def frames_of(target: Backmapper, beads: np.ndarray, seed: int) -> FlowFrames:
    """Draw frames of the potential for which `target` is exact."""
    s = torch.tensor(beads, requires_grad=True)
    x = target(s.detach()).rsample(rng=np.random.default_rng(seed)).detach().numpy()
    energy, forces = ExactPotential(target)(x)
    of_beads = free_energy(s)
    (gradient,) = torch.autograd.grad(of_beads.sum(), s)
    return FlowFrames(
        x, np.ones(len(x)), forces, energy, -gradient.numpy(), of_beads.detach().numpy()
    )


def batch_of(frames: FlowFrames) -> dict[str, torch.Tensor]:
    """Return frames as `flow_loss` takes them, in double precision."""
    excess = (frames.energy - frames.free_energy) / KT
    arrays = {
        "positions": frames.positions,
        "weight": frames.weight,
        "forces": frames.forces / KT,
        "bead_force": frames.bead_force / KT,
        "excess_energy": excess - excess.mean(),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def directions(flow: Backmapper, n: int) -> list[list[torch.Tensor]]:
    """Return random directions in parameter space, of norm one."""
    generator = torch.Generator().manual_seed(9)
    found = []
    for _ in range(n):
        parts = [
            torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for p in flow.parameters()
        ]
        norm = torch.sqrt(sum((part**2).sum() for part in parts))
        found.append([part / norm for part in parts])
    return found


def moved(flow: Backmapper, direction: list[torch.Tensor], step: float) -> Backmapper:
    """Return a copy whose parameters are a step along a direction away."""
    flow = copy.deepcopy(flow)
    with torch.no_grad():
        for parameter, part in zip(flow.parameters(), direction, strict=True):
            parameter += step * part
    return flow


def slope(loss: torch.Tensor, flow: Backmapper, direction: list[torch.Tensor]) -> float:
    """Return the derivative of a loss along a direction."""
    gradients = torch.autograd.grad(
        loss, list(flow.parameters()), allow_unused=True, retain_graph=True
    )
    pairs = zip(gradients, direction, strict=True)
    return float(sum((g * part).sum() for g, part in pairs if g is not None))

"""The log-weight of a flow and its slope as functions of the noise, at many bead states at once.

At fixed s, the flow x = g(ε; s) turns integrals over the fibre into integrals over its noise:
Z(s) = ∫ r(ε) exp l(s, ε) dε, with r the density of the noise and l = -U(x)/kT - ln q(x|s). Samplers
that move there need no geometry of molecules: r is standard normal or uniform on a circle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from ccg_ase.devices import device_of
from ccg_ase.units import thermal_energy
from ccg_mda.transforms import wrap

_FARTHEST_A = 1e6  # No atom is there; where trajectories diverge, potentials would overflow


@dataclass(frozen=True, eq=False)
class NoisePoints:
    """K points in noise space at each of S states, with all that one energy call tells of them.

    Attributes
    ----------
    noise
        ε, (S, K, n_dof).
    log_base, base_slope
        ln r, (S, K), and ∂ln r/∂ε, (S, K, n_dof).
    log_weight, slope
        l, (S, K), and ∂l/∂ε, (S, K, n_dof); -inf and any finite slope where atoms clash.
    positions, forces
        x, (S, K, n_atoms, 3), Å, and -∂U/∂x, eV/Å.
    energy, log_prob
        U, (S, K), eV, and ln q(x|s).
    """

    noise: Tensor
    log_base: Tensor
    base_slope: Tensor
    log_weight: Tensor
    slope: Tensor
    positions: Tensor
    forces: Tensor
    energy: Tensor
    log_prob: Tensor

    def log_target(self, fraction: float) -> Tensor:
        """Return ln r + λ l, (S, K), with λ the ``fraction``."""
        return self.log_base + (fraction * self.log_weight if fraction > 0 else 0.0)

    def target_slope(self, fraction: float) -> Tensor:
        """Return ∂/∂ε of `log_target`, (S, K, n_dof)."""
        return self.base_slope + fraction * self.slope

    def replaced(self, where: Tensor, other: NoisePoints) -> NoisePoints:
        """Return these points with those of ``other`` where a mask (S, K) says so."""
        return NoisePoints(
            *(
                torch.where(where.reshape(*where.shape, *[1] * (mine.ndim - 2)), its, mine)
                for mine, its in zip(self._arrays(), other._arrays(), strict=True)
            )
        )

    def taken(self, index: Tensor) -> NoisePoints:
        """Return point index[s, k] of state s as its point k; index has shape (S, K)."""
        index = index.to(self.noise.device)
        states = torch.arange(len(index), device=index.device)[:, None]
        return NoisePoints(*(array[states, index] for array in self._arrays()))

    def _arrays(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


class NoiseSpace:
    """Noise space of a flow at given states; evaluates points and counts the energy calls.

    Parameters
    ----------
    backmapper
        A `Backmapper`, at its own temperature.
    potential
        Atomistic energies and forces, called once per point. A point of infinite energy has weight
        zero, and so has one with an atom beyond 10⁶ Å or at NaN, for which it isn't called.
    beads
        Coarse states, (S, n_beads, 3) in Å or (S, n_torsions) in rad.
    batch_size
        Points per pass, which bounds the memory of the graph.

    Attributes
    ----------
    n_calls
        Energy-and-force calls so far.

    Raises
    ------
    ValueError
        If the states don't fit the backmapper.
    """

    def __init__(
        self,
        backmapper: nn.Module,
        potential: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        beads: np.ndarray,
        *,
        batch_size: int = 1024,
    ) -> None:
        self.backmapper, self.potential, self.batch_size = backmapper, potential, batch_size
        self.beads = torch.as_tensor(beads).detach().to(device_of(backmapper), torch.float64)
        inner = backmapper.cg_map.coarse_shape
        if self.beads.ndim != len(inner) + 1 or self.beads.shape[1:] != inner:
            raise ValueError(
                f"need states (S, {', '.join(map(str, inner))}), got {tuple(self.beads.shape)}: "
                "they belong to another mapping than this model"
            )
        self.n_calls = 0
        self._kT = thermal_energy(backmapper.temperature_K)

    def draw(self, n_samples: int, rng: np.random.Generator) -> NoisePoints:
        """Draw K points of r at every state."""
        return self.at(self.backmapper.sample_noise(rng, (len(self.beads), n_samples)))

    def moved(self, noise: Tensor, by: Tensor) -> Tensor:
        """Return noise moved on its support: along the line, or round the circle."""
        there = noise + by
        return torch.where(self.backmapper.circular_noise, wrap(there), there)

    def at(self, noise: Tensor) -> NoisePoints:
        """Evaluate the points of noise (S, K, n_dof)."""
        flat_noise = noise.flatten(0, 1)
        flat_beads = self.beads.repeat_interleave(noise.shape[1], 0)
        pieces = [
            self._batch(beads, part)
            for beads, part in zip(
                flat_beads.split(self.batch_size), flat_noise.split(self.batch_size), strict=True
            )
        ]
        arrays = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        return NoisePoints(*(array.unflatten(0, noise.shape[:2]) for array in arrays))

    def _batch(self, beads: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Return the arrays of `NoisePoints` of a flat batch."""
        with torch.enable_grad():
            noise = noise.clone().requires_grad_()
            log_base = self.backmapper.log_base(noise)
            (base_slope,) = torch.autograd.grad(log_base.sum(), noise)
            x, log_prob = self.backmapper(beads).positions_and_log_prob_from(noise)
            energy, forces = self._energy_and_forces(x.detach())
            # Its slope is that of l, so that no differentiable potential is needed.
            surrogate = (forces / self._kT * x).sum((-1, -2)) - log_prob
            (slope,) = torch.autograd.grad(surrogate.sum(), noise)
        log_prob = log_prob.detach()
        regular = torch.isfinite(energy) & torch.isfinite(log_prob)
        log_weight = torch.where(regular, -energy / self._kT - log_prob, -torch.inf)
        # Any slope will do where the weight is zero: leapfrog is reversible with whatever function.
        slope = torch.where(torch.isfinite(slope), slope, 0.0)
        arrays = (noise, log_base, base_slope, log_weight, slope, x, forces, energy, log_prob)
        return tuple(array.detach() for array in arrays)

    def _energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Call the potential where positions (n, n_atoms, 3) are in reach; else U = +inf."""
        near = (x.abs() < _FARTHEST_A).all(-1).all(-1)
        energy, forces = x.new_full(x.shape[:1], torch.inf), torch.zeros_like(x)
        values = self.potential(x[near].cpu().numpy())
        energy[near], forces[near] = (torch.as_tensor(v).to(x) for v in values)
        self.n_calls += int(near.sum())
        return energy, forces

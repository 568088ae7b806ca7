"""Backmapper: the exact-density flow q(x|s) from beads to atoms.

    ln q(x|s) = Σ_blocks ln p(y_block | beads, earlier atoms) - Σ_atoms ln |dx/dy|

Atoms follow one another in anchored internal coordinates (:mod:`.placement`), each a smooth
bijection of its noise (:mod:`.transforms`) with parameters from the causal conditioner. Both
directions are explicit: ``noise_from`` is one parallel pass, ``positions_from`` one pass per
generation of atoms.
"""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ccg_ase.checkpoint import ModelFile, load_model
from ccg_ase.mapping import CGMap

from .conditioner import N_HARMONICS, Conditioner
from .placement import Placement, local_frames, measure, place
from .transforms import TWO_PI, Chart, CircularDensity, wrap

_LOG_2PI = math.log(TWO_PI)
_ROTOR_SPREAD = 0.5  # rad; a proper torsion whose circular spread exceeds this is a rotor


class Backmapper(nn.Module):
    """Conditional distribution of atoms given beads, of exactly known density.

    Parameters
    ----------
    cg_map
        The map; every bead must be an atom (a slice map) of one molecule.
    temperature_K
        The temperature of the data; conditioning at another one is refused.
    rotor
        Which placed atoms rotate freely, one flag per slot of :class:`Placement`.
    width, n_layers, hops, bead_hops, channels, cutoff_A
        See :class:`Conditioner`.

    Notes
    -----
    A new backmapper has unit statistics; :meth:`from_data` makes one that fits a trajectory. The
    noise has three numbers per placed atom (r, θ, φ): standard normal, but uniform on [-π, π) for a
    rotor's φ.
    """

    def __init__(
        self, cg_map: CGMap, temperature_K: float, *, rotor: list[bool], **architecture: Any
    ) -> None:
        super().__init__()
        self.cg_map, self.temperature_K = cg_map, float(temperature_K)
        self.placement = placement = Placement.from_map(cg_map)
        self._rotor = np.asarray(rotor, dtype=bool)
        self.conditioner = Conditioner(cg_map, placement, self._rotor, **architecture)
        n = len(placement.atoms)
        self.register_buffer("location", torch.zeros(n, 3))
        self.register_buffer("scale", torch.ones(n, 3))
        index = {
            "references": placement.references,
            "point_of_atom": placement.point_of_atom,
            "rotor": self._rotor,
            "rotor_dof": self._rotor[:, None] & np.array([False, False, True]),
            "multiplicity": placement.multiplicity,
            "atom_of_slot": placement.atoms,
        }
        for name, value in index.items():
            self.register_buffer(name, torch.as_tensor(value), persistent=False)
        self._passes = self.conditioner.blocks.passes()
        self.double()

    @property
    def n_dof(self) -> int:
        """Number of noise variables: three per placed atom."""
        return 3 * len(self.placement.atoms)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able arguments that rebuild this module, beside the map and temperature."""
        return {"rotor": self._rotor.tolist(), **self.conditioner.config}

    @classmethod
    def from_config(cls, cg_map: CGMap, temperature_K: float, config: dict) -> Backmapper:
        """Build an untrained backmapper from :attr:`config`."""
        return cls(cg_map, temperature_K, **config)

    @classmethod
    def from_model(cls, model: ModelFile) -> Backmapper:
        """Build the backmapper of a loaded model file."""
        return model.restore("backmapper", cls).eval()

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Backmapper:
        """Load the backmapper of a ``.ccg`` model file."""
        return cls.from_model(load_model(path))

    @classmethod
    def from_data(
        cls, cg_map: CGMap, temperature_K: float, positions: Tensor, **architecture: Any
    ) -> Backmapper:
        """Build a backmapper whose coordinates are standardised by frames (n, n_atoms, 3) in Å.

        Proper torsions that spread over more than half a radian become rotors on the full circle.

        Raises
        ------
        ValueError
            If a bond, angle or stiff dihedral does not fluctuate: constrained bonds need data from
            a run without constraints.
        """
        placement = Placement.from_map(cg_map)
        points = positions.double()[:, np.argsort(placement.point_of_atom)]
        references = torch.as_tensor(placement.references)
        origin, frame = local_frames(points, references)
        r, theta, phi = measure(origin, frame, points[:, cg_map.n_beads :])
        resultant = torch.exp(1j * phi).mean(0)
        spread = torch.sqrt(-2.0 * torch.log(resultant.abs()))
        rotor = (spread > _ROTOR_SPREAD).numpy() & placement.proper
        backmapper = cls(cg_map, temperature_K, rotor=rotor.tolist(), **architecture)
        log_r, log_tan = Chart.flatten(r, theta)
        centre = torch.where(torch.as_tensor(rotor), 0.0, resultant.angle())
        half = 2.0 * torch.tan(0.5 * wrap(phi - centre))
        scale = torch.stack([log_r.std(0), log_tan.std(0), half.std(0)], -1)
        scale[torch.as_tensor(rotor), 2] = 1.0
        rigid = (scale < 1e-4).any(-1)
        if rigid.any():
            names = [cg_map.atoms.names[placement.atoms[k]] for k in torch.nonzero(rigid)[:, 0]]
            raise ValueError(
                f"the bond length or angle of atom(s) {names[:6]} does not fluctuate in the data: "
                "constrained coordinates are not supported yet; use data from a run without "
                "constraints (time step 1 fs or less)"
            )
        backmapper.location.copy_(torch.stack([log_r.mean(0), log_tan.mean(0), centre], -1))
        backmapper.scale.copy_(scale)
        backmapper.conditioner.set_statistics(points[:: max(1, len(points) // 5000)])
        return backmapper

    def forward(self, beads: Tensor, *, temperature_K: float | None = None) -> BackmapDistribution:
        """Return q(x|s) for ``beads`` of shape (..., n_beads, 3) in Å.

        Raises
        ------
        ValueError
            If the number of beads or the temperature is not the model's, or a bead is not finite.
        """
        if beads.shape[-2:] != (self.cg_map.n_beads, 3):
            raise ValueError(
                f"expected beads of shape (..., {self.cg_map.n_beads}, 3), got "
                f"{tuple(beads.shape)}: the trajectory belongs to another mapping than this model"
            )
        if temperature_K is not None and abs(temperature_K - self.temperature_K) > 1e-6:
            raise ValueError(
                f"this backmapper was trained at {self.temperature_K:g} K and holds at that "
                f"temperature only; {temperature_K:g} K was asked for"
            )
        if not torch.isfinite(beads).all():
            raise ValueError("bead positions contain NaN or infinity")
        return BackmapDistribution(self, beads)

    def sample_noise(self, rng: np.random.Generator, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw base noise (*shape, n_dof), float64: the same for the same generator everywhere."""
        noise = rng.standard_normal((*shape, len(self._rotor), 3))
        noise[..., self._rotor, 2] = rng.uniform(-np.pi, np.pi, (*shape, int(self._rotor.sum())))
        return torch.from_numpy(noise.reshape(*shape, self.n_dof))

    # The two directions, for one flat batch. Noise and coordinates have shape (batch, n_slots, 3).

    def points_from(self, beads: Tensor, positions: Tensor) -> Tensor:
        """Return beads and placed atoms in placement order, (batch, n_points, 3)."""
        return torch.cat([beads, positions[:, self.atom_of_slot]], dim=1)

    def _harmonics(self, phi: Tensor) -> Tensor:
        orders = torch.arange(1, N_HARMONICS + 1, dtype=phi.dtype, device=phi.device)
        waves = phi[..., None] * orders
        return torch.cat([torch.cos(waves), torch.sin(waves)], -1) * self.rotor[..., None]

    def to_noise(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise of ``points`` and ln q, in one parallel pass."""
        noise, log_p, log_dx = self.to_noise_terms(points)
        return noise, log_p.sum((-1, -2)) - log_dx.sum(-1)

    def to_noise_terms(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return noise, log-densities of (r, θ, φ), both (batch, n_slots, 3), and ln(r² sin θ)."""
        beads, blocks = points[:, : self.cg_map.n_beads], self.conditioner.blocks
        chart = Chart(self.location, self.scale)
        origin, frame = local_frames(points, self.references)
        r, theta, phi = measure(origin, frame, points[:, self.cg_map.n_beads :])
        y = chart.standardise(r, theta, phi)
        harmonics = self._harmonics(phi)
        slot = self.conditioner.slot
        circular = torch.as_tensor(blocks.circular, device=slot.device)
        own = harmonics[:, slot] * ~circular[:, None]
        parameters, _, _ = self.conditioner(
            points,
            torch.cat([y.masked_fill(self.rotor_dof, 0.0), harmonics], -1),
            self.conditioner.encode(beads),
            own,
            torch.arange(len(slot), device=slot.device),
        )
        affine = _Affine(parameters[:, ~circular])
        z, log_p = affine.noise(y)
        log_dx = 2.0 * torch.log(r) + torch.log(torch.sin(theta))
        derivatives = chart.log_derivatives(r, theta, phi)
        is_rotor = self.rotor_dof
        log_p = log_p - derivatives
        if circular.any():
            multiplicity = self.multiplicity[self.rotor]
            angle = phi[:, self.rotor] * multiplicity
            density = CircularDensity(parameters[:, circular, : 2 * N_HARMONICS + 1])
            v = wrap(density.uniform(angle) / multiplicity)
            z = z.masked_scatter(is_rotor, v)
            log_p = log_p.masked_scatter(is_rotor, density.log_density(angle) - _LOG_2PI)
        return z, log_p, log_dx

    def from_noise(self, beads: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the points placed from ``noise`` and ln q; twice differentiable in both."""
        n_slots, blocks = len(self._rotor), self.conditioner.blocks
        chart = Chart(self.location, self.scale)
        encoded = self.conditioner.encode(beads)
        points = torch.cat([beads, beads.new_zeros(len(beads), n_slots, 3)], 1)
        inner = beads.new_zeros(len(beads), n_slots, 3 + 2 * N_HARMONICS)
        phi_rotor = beads.new_zeros(len(beads), n_slots)
        log_q = beads.new_zeros(len(beads))
        for chosen in self._passes:
            index = torch.as_tensor(chosen, device=beads.device)
            slots = self.conditioner.slot[index]
            harmonics = self._harmonics(phi_rotor)[:, slots]
            first = bool(blocks.circular[chosen[0]])
            own = torch.zeros_like(harmonics) if first else harmonics
            parameters, origin, frame = self.conditioner(points, inner, encoded, own, index)
            z = noise[:, slots]
            if first:
                multiplicity = self.multiplicity[slots]
                density = CircularDensity(parameters[..., : 2 * N_HARMONICS + 1])
                angle = density.inverse(z[..., 2] * multiplicity)
                log_q = log_q + (density.log_density(angle) - _LOG_2PI).sum(-1)
                phi_rotor = phi_rotor.index_copy(1, slots, angle / multiplicity)
                continue
            y, log_p = _Affine(parameters).coordinates(z)
            local = Chart(chart.location[slots], chart.scale[slots])
            r, theta, phi = local.coordinates(y)
            is_rotor = self.rotor_dof[slots]
            phi = torch.where(self.rotor[slots], phi_rotor[:, slots], phi)
            derivatives = local.log_derivatives(r, theta, phi)
            log_q = log_q + (log_p - derivatives).masked_fill(is_rotor, 0.0).sum((-1, -2))
            log_q = log_q - (2.0 * torch.log(r) + torch.log(torch.sin(theta))).sum(-1)
            atoms = place(origin, frame, r, theta, phi)
            points = points.index_copy(1, self.cg_map.n_beads + slots, atoms)
            features = torch.cat([y.masked_fill(is_rotor, 0.0), harmonics], -1)
            inner = inner.index_copy(1, slots, features)
        return points, log_q


class _Affine:
    """Lower-triangular affine map ``y = μ + exp(l) (I + L) z`` of a block's coordinates."""

    def __init__(self, parameters: Tensor) -> None:
        self.shift = parameters[..., 0:3]
        self.log_scale = 3.0 * torch.tanh(parameters[..., 3:6] / 3.0)
        self.coupling = parameters[..., 6:9]

    def _log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * (z * z + _LOG_2PI) - self.log_scale

    def coordinates(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``y`` and the log-density of each coordinate, shapes (batch, n, 3)."""
        a, b, c = z.unbind(-1)
        k, m, n = self.coupling.unbind(-1)
        mixed = torch.stack([a, b + k * a, c + m * a + n * b], -1)
        return self.shift + torch.exp(self.log_scale) * mixed, self._log_prob(z)

    def noise(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``z`` and the log-density of each coordinate; inverse of :meth:`coordinates`."""
        a, b, c = ((y - self.shift) * torch.exp(-self.log_scale)).unbind(-1)
        k, m, n = self.coupling.unbind(-1)
        b = b - k * a
        z = torch.stack([a, b, c - m * a - n * b], -1)
        return z, self._log_prob(z)


class BackmapDistribution:
    """q(x|s) at given beads; made by calling a :class:`Backmapper`.

    Batch shape B is ``beads.shape[:-2]``; sample shapes S come in front of it. Densities are with
    respect to the Cartesian volume of the placed atoms, in Å, on the fibre {x : M x = s}.
    """

    def __init__(self, backmapper: Backmapper, beads: Tensor) -> None:
        self.backmapper, self.beads = backmapper, beads
        self.batch_shape = beads.shape[:-2]

    def _flat_beads(self, shape: torch.Size) -> Tensor:
        return self.beads.expand(*shape, *self.beads.shape[-2:]).flatten(0, -3)

    def positions_and_log_prob_from(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions (*S, *B, n_atoms, 3) and ln q (*S, *B) of ``noise`` (*S, *B, n_dof)."""
        shape = noise.shape[:-1]
        flow = self.backmapper
        beads = self._flat_beads(shape) if shape else self.beads[None]
        points, log_q = flow.from_noise(beads, noise.reshape(-1, flow.n_dof // 3, 3))
        positions = points[:, flow.point_of_atom]
        return positions.reshape(*shape, -1, 3), log_q.reshape(shape)

    def positions_from(self, noise: Tensor) -> Tensor:
        """Return the positions of ``noise``: smooth in noise and beads."""
        return self.positions_and_log_prob_from(noise)[0]

    def noise_and_log_prob_from(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return noise (*S, *B, n_dof) and ln q (*S, *B) of positions (*S, *B, n_atoms, 3).

        Raises
        ------
        ValueError
            If the positions do not map onto the beads (by more than 0.001 Å).
        """
        shape = positions.shape[:-2]
        flow = self.backmapper
        error = (flow.cg_map.apply(positions) - self.beads).abs().max()
        if not error < 1e-3:
            raise ValueError(
                f"the positions map to other beads than given (off by up to {error:.3g} Å): "
                "the density is defined on the fibre M x = s only"
            )
        beads = self._flat_beads(shape) if shape else self.beads[None]
        points = flow.points_from(beads, positions.reshape(-1, *positions.shape[-2:]))
        noise, log_q = flow.to_noise(points)
        return noise.reshape(*shape, flow.n_dof), log_q.reshape(shape)

    def noise_from(self, positions: Tensor) -> Tensor:
        """Return the noise of positions; inverse of :meth:`positions_from`."""
        return self.noise_and_log_prob_from(positions)[0]

    def log_prob(self, positions: Tensor) -> Tensor:
        """Return ln q(x|s), shape (*S, *B)."""
        return self.noise_and_log_prob_from(positions)[1]

    def rsample_and_log_prob(
        self, shape: tuple[int, ...] = (), rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw positions (*shape, *B, n_atoms, 3) with ln q; differentiable in the beads."""
        rng = np.random.default_rng() if rng is None else rng
        noise = self.backmapper.sample_noise(rng, (*shape, *self.batch_shape))
        return self.positions_and_log_prob_from(noise.to(self.beads))

    def rsample(
        self, shape: tuple[int, ...] = (), rng: np.random.Generator | None = None
    ) -> Tensor:
        """Draw positions (*shape, *B, n_atoms, 3)."""
        return self.rsample_and_log_prob(shape, rng)[0]

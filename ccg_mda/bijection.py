"""The flow's bijection between noise and atoms at given s, in both directions, with its density.

    ln q(x|s) = Σ_blocks ln p(y_block | s, earlier atoms) - Σ_atoms ln |dx/dy| + Σ_beads 3 ln W

Atoms follow one another in anchored internal coordinates (:mod:`.placement`), each a smooth
bijection of its noise (:mod:`.coordinates`) with parameters from the causal conditioner; the atoms
of a bead are shifted into place together (:mod:`.assembly`). Both directions are explicit: noise
from positions is one parallel pass, positions from noise one pass per generation of atoms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap

from .assembly import Assembly
from .circular import N_ROTOR, CircularDensity
from .conditioner import Conditioner, harmonics, saturated
from .coordinates import Coordinates
from .placement import Placement, local_frames, place
from .transforms import TWO_PI, Base, wrap

_LOG_2PI = math.log(TWO_PI)


class _Step(NamedTuple):
    """What happens in one generation of sampling: beads and blocks."""

    opening: Tensor
    circular: Tensor
    rest: Tensor
    closing: Tensor


class Bijection(nn.Module):
    """Noise to atoms and back, for one flat batch of frames.

    Noise and coordinates have shape (batch, n_slots, 3), of r, θ, φ of the atom in each slot of the
    placement; those that aren't :attr:`active` have no noise.

    Parameters
    ----------
    cg_map, placement
        The coarse variables, and how the atoms are placed.
    rotor, rigid
        Which φ go round the circle, (n_slots,), and which coordinates are held, (n_slots, 3).
    temperature_K
        The temperature that the parameters without correction belong to.
    base
        Distribution of the noise.
    hops, **architecture
        See :class:`Conditioner`.
    """

    def __init__(
        self,
        cg_map: CGMap | TorsionMap,
        placement: Placement,
        rotor: np.ndarray,
        rigid: np.ndarray,
        *,
        temperature_K: float,
        base: Base,
        hops: int,
        **architecture: Any,
    ) -> None:
        super().__init__()
        self.cg_map, self.placement = cg_map, placement
        self.temperature_K, self.base = temperature_K, base
        self._rotor, self._rigid = rotor, rigid
        self.coordinates = Coordinates(cg_map, placement, rotor, rigid)
        self.conditioner = Conditioner(cg_map, placement, rotor, hops=hops, **architecture)
        self.assembly = Assembly(cg_map, placement)
        multiplicity = torch.as_tensor(placement.multiplicity)
        self.register_buffer("multiplicity", multiplicity, persistent=False)
        self._steps = self._schedule()

    def _schedule(self) -> list[_Step]:
        """Return what happens in each generation of sampling."""
        blocks = self.conditioner.blocks
        opening, closing = self.assembly.opening, self.assembly.closing
        generation = blocks.generation // 2
        last = max(generation.max(initial=-1), opening.max(initial=-1))

        def chosen(flags: np.ndarray) -> Tensor:
            return torch.tensor(np.flatnonzero(flags))

        return [
            _Step(
                chosen(opening == g),
                chosen((generation == g) & blocks.circular),
                chosen((generation == g) & ~blocks.circular),
                chosen(closing == g),
            )
            for g in range(last + 1)
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bijection:
        # The schedule isn't a buffer, but has to go wherever these do.
        super()._apply(fn, recurse)
        self._steps = [_Step(*map(fn, step)) for step in self._steps]
        return self

    @property
    def active(self) -> Tensor:
        """Which coordinates r, θ, φ of each slot have noise, (n_slots, 3)."""
        return self.coordinates.active

    @property
    def rotor_dof(self) -> Tensor:
        """Which noise is uniform on the circle, (n_slots, 3)."""
        return self.coordinates.rotor_dof

    @property
    def normal_dof(self) -> Tensor:
        """Which noise is standard normal, (n_slots, 3)."""
        return self.coordinates.normal_dof

    @property
    def n_dof(self) -> int:
        """Number of noise variables: degrees of freedom that s leaves open."""
        return int(self.active.sum())

    def sample_noise(self, rng: np.random.Generator, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw base noise (*shape, n_dof), float64: the same for the same generator everywhere.

        Numbers are drawn on the CPU, then put where the flow is.
        """
        masks = (self.normal_dof, self.rotor_dof, self.coordinates.charted)
        noise = self.base.sample(rng, shape, *(mask.cpu().numpy() for mask in masks))
        return noise[..., self.active.cpu()].to(self.active.device)

    def log_base(self, noise: Tensor) -> Tensor:
        """Return the log-density, (*shape,), of base noise (*shape, n_dof); of `sample_noise`."""
        slots = self.by_slot(noise.reshape(-1, self.n_dof))
        masks = (self.normal_dof, self.rotor_dof, self.coordinates.charted)
        return self.base.log_density(slots, *masks).reshape(noise.shape[:-1])

    @property
    def circular_noise(self) -> Tensor:
        """Which of the noise variables are angles, periodic on [-π, π); boolean, (n_dof,)."""
        return self.rotor_dof[self.active]

    def by_slot(self, noise: Tensor) -> Tensor:
        """Return noise (batch, n_dof) as (batch, n_slots, 3), zero where there is none."""
        where = torch.nonzero(self.active.flatten())[:, 0]
        zeros = noise.new_zeros(len(noise), self.active.numel())
        return zeros.index_copy(1, where, noise).unflatten(1, self.active.shape)

    def _condition(
        self, coarse: Tensor, temperature_K: Tensor | None, box: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Return what the conditioner knows of s, whatever the atoms."""
        log_temperature = None
        if temperature_K is not None:
            log_temperature = torch.log(temperature_K / self.temperature_K)
        return {
            "encoded": self.conditioner.encode(coarse, box),
            "box": box,
            "coarse": coarse,
            "log_temperature": log_temperature,
        }

    def internal_coordinates(self, positions: Tensor, coarse: Tensor) -> Tensor:
        """Return r, θ, φ of every slot, (batch, n_slots, 3), of atoms (batch, n_atoms, 3)."""
        points = self.assembly.points(coarse, positions)
        return self.coordinates.measure(points)

    def place_atoms(self, values: Tensor, coarse: Tensor) -> Tensor:
        """Return the atoms at given internal coordinates; inverse of `internal_coordinates`.

        Coordinates that aren't active are taken from s, or are what they are held at.
        """
        points, coordinates = self.assembly.first_points(coarse), self.coordinates
        every = torch.arange(values.shape[1], device=values.device)
        values = coordinates.hold(values, coarse, every)
        for step in self._steps:
            if len(step.opening):
                points = self.assembly.open(points, coarse, step.opening)
            if len(step.rest):
                slots = self.conditioner.slot[step.rest]
                frames = local_frames(points, coordinates.references[slots])
                given = values[:, slots].unbind(-1)
                atoms = place(*frames, *given, coordinates.linear[slots])
                points = points.index_copy(1, coordinates.point_of_slot[slots], atoms)
            if len(step.closing):
                points = self.assembly.close(points, coarse, step.closing)
        return self.assembly.atoms(points)

    def _rotor_density(self, raw: Tensor, slots: Tensor) -> CircularDensity:
        return CircularDensity(raw[..., :N_ROTOR], self.multiplicity[slots].to(raw.dtype))

    def _features(self, y: Tensor, phi: Tensor, slots: Tensor) -> Tensor:
        """Return what later atoms may know of the coordinates of slots, (batch, n, 3 + 2 K)."""
        y = saturated(y) * self.coordinates.invariant[slots]
        return torch.cat([y, harmonics(phi) * self.coordinates.rotor[slots, None]], -1)

    def _log_constant(self, noise: Tensor) -> Tensor:
        """Return what ln q has beside blocks and volumes: of fragments and the wide component."""
        return self.base.log_ratio(noise, self.coordinates.charted) + self.assembly.log_volume

    def to_noise_terms(
        self,
        positions: Tensor,
        coarse: Tensor,
        *,
        temperature_K: Tensor | None = None,
        box: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return noise, log-densities of its coordinates, and ln q, in one parallel pass.

        Parameters
        ----------
        positions, coarse
            Shapes (batch, n_atoms, 3) and (batch, ...): atoms and what they map to.
        temperature_K, box
            Of every frame, (batch,) and (batch, 3, 3), or None.

        Returns
        -------
        noise, log_p, log_q
            Shapes (batch, n_slots, 3) twice, of r, θ, φ, zero where held; and (batch,).
        """
        condition = self._condition(coarse, temperature_K, box)
        points, coordinates = self.assembly.points(coarse, positions), self.coordinates
        every = torch.arange(len(self.placement.atoms), device=points.device)
        values = coordinates.hold(coordinates.measure(points), coarse, every)
        y = coordinates.standardise(values)
        inner = self._features(y, values[..., 2], every)
        slot, circular = self.conditioner.slot, self.conditioner.circular
        raw, _, _ = self.conditioner(
            points,
            nn.functional.pad(inner, (0, 0, 0, 1)),
            own=inner[:, slot, 3:] * ~circular[:, None],
            blocks=torch.arange(len(slot), device=slot.device),
            **condition,
        )
        affine = coordinates.affine(raw[:, ~circular], every, condition["log_temperature"])
        noise, log_p, log_volume = coordinates.noise(affine, values, y)
        if coordinates.any_rotor:
            density = self._rotor_density(raw[:, circular], slot[circular])
            angle = values[:, coordinates.rotor, 2]
            where = torch.zeros_like(self.active)
            where[:, 2] = coordinates.rotor
            noise = noise.masked_scatter(where, wrap(density.uniform(angle)))
            log_p = log_p.masked_scatter(where, density.log_density(angle) - _LOG_2PI)
        return noise, log_p, log_p.sum((-1, -2)) - log_volume + self._log_constant(noise)

    def from_noise(
        self,
        coarse: Tensor,
        noise: Tensor,
        *,
        temperature_K: Tensor | None = None,
        box: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return positions (batch, n_atoms, 3) and ln q; twice differentiable in s and noise."""
        condition = self._condition(coarse, temperature_K, box)
        points, coordinates = self.assembly.first_points(coarse), self.coordinates
        n_slots = noise.shape[1]
        inner = coarse.new_zeros(len(coarse), n_slots + 1, self.conditioner.n_inner)
        rotor_phi = coarse.new_zeros(len(coarse), n_slots)
        log_q = self._log_constant(noise)
        for step in self._steps:
            if len(step.opening):
                points = self.assembly.open(points, coarse, step.opening)
            if len(step.circular):
                slots = self.conditioner.slot[step.circular]
                own = coarse.new_zeros(len(coarse), len(slots), self.conditioner.n_inner - 3)
                raw, _, _ = self.conditioner(
                    points, inner, own=own, blocks=step.circular, **condition
                )
                density = self._rotor_density(raw, slots)
                angle = density.inverse(noise[:, slots, 2])
                log_q = log_q + (density.log_density(angle) - _LOG_2PI).sum(-1)
                rotor_phi = rotor_phi.index_copy(1, slots, angle)
            if len(step.rest):
                slots = self.conditioner.slot[step.rest]
                phi = rotor_phi[:, slots]
                own = harmonics(phi) * coordinates.rotor[slots, None]
                raw, origin, frame = self.conditioner(
                    points, inner, own=own, blocks=step.rest, **condition
                )
                affine = coordinates.affine(raw, slots, condition["log_temperature"])
                values, y, gain = coordinates.values(affine, noise[:, slots], phi, coarse, slots)
                log_q = log_q + gain
                atoms = place(origin, frame, *values.unbind(-1), coordinates.linear[slots])
                points = points.index_copy(1, coordinates.point_of_slot[slots], atoms)
                inner = inner.index_copy(1, slots, self._features(y, phi, slots))
            if len(step.closing):
                points = self.assembly.close(points, coarse, step.closing)
        return self.assembly.atoms(points), log_q

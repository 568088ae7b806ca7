"""Backmapper: the exact-density flow q(x|s) from beads, or torsions, to atoms.

    ln q(x|s) = Σ_blocks ln p(y_block | s, earlier atoms) - Σ_atoms ln |dx/dy| + Σ_beads 3 ln W

Atoms follow one another in anchored internal coordinates (:mod:`.placement`), each a smooth
bijection of its noise (:mod:`.coordinates`) with parameters from the causal conditioner; the atoms
of a bead are shifted into place together (:mod:`.assembly`). Both directions are explicit: noise
from positions is one parallel pass, positions from noise one pass per generation of atoms.
"""

from __future__ import annotations

import math
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ccg_ase.checkpoint import ModelFile, load_model
from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap

from .assembly import Assembly, Whole
from .conditioner import Conditioner, harmonics
from .coordinates import Coordinates
from .distribution import BackmapDistribution
from .placement import Placement, atom_label, local_frames, place
from .placement_order import build_placement
from .statistics import coordinate_statistics
from .transforms import N_ROTOR, TWO_PI, Base, CircularDensity, wrap

_LOG_2PI = math.log(TWO_PI)
_STATISTICS_FRAMES = 5000


class _Step(NamedTuple):
    """What happens in one generation of sampling: beads and blocks."""

    opening: Tensor
    circular: Tensor
    rest: Tensor
    closing: Tensor


class Backmapper(nn.Module):
    """Conditional distribution of atoms given coarse variables s, of exactly known density.

    Parameters
    ----------
    cg_map
        The coarse variables: beads of any linear map, or torsions.
    temperature_K
        The temperature of the data, T0.
    rotor
        Which φ go round the circle, one flag per slot of the placement.
    rigid
        Which coordinates r, θ, φ of each slot are held, (n_slots, 3); none by default.
    placement
        How the atoms are placed; by default what :func:`build_placement` gives.
    defensive
        Weight of a component with noise 1.5 times as wide, mixed into the density (theory.md E8).
    temperatures_K
        Lowest and highest temperature that the model was trained for; T0 alone by default.
    width, n_layers, hops, bead_hops, channels, cutoff_A
        See :class:`Conditioner`.

    Notes
    -----
    A new backmapper has unit statistics; :meth:`from_data` makes one that fits a trajectory. The
    noise has one number per degree of freedom: three per placed atom (r, θ, φ), less those that are
    rigid. It is standard normal, but uniform on [-π, π) for the φ of a rotor.
    """

    def __init__(
        self,
        cg_map: CGMap | TorsionMap,
        temperature_K: float,
        *,
        rotor: list[bool] | np.ndarray,
        rigid: list[list[bool]] | np.ndarray | None = None,
        placement: Placement | None = None,
        defensive: float = 0.0,
        temperatures_K: tuple[float, float] | None = None,
        hops: int = 3,
        **architecture: Any,
    ) -> None:
        super().__init__()
        self.cg_map, self.temperature_K = cg_map, float(temperature_K)
        low, high = temperatures_K or (self.temperature_K, self.temperature_K)
        self.temperatures_K = (float(low), float(high))
        self.placement = placement or build_placement(cg_map, hops=hops)
        self.base = Base(defensive)
        shape = (len(self.placement.atoms), 3)
        self._rotor = np.asarray(rotor, dtype=bool)
        self._rigid = np.zeros(shape, bool) if rigid is None else np.asarray(rigid, bool)
        self.coordinates = Coordinates(cg_map, self.placement, self._rotor, self._rigid)
        self.conditioner = Conditioner(
            cg_map, self.placement, self._rotor, hops=hops, **architecture
        )
        self.assembly = Assembly(cg_map, self.placement)
        self.whole = Whole(cg_map) if isinstance(cg_map, CGMap) else None
        multiplicity = torch.as_tensor(self.placement.multiplicity)
        self.register_buffer("multiplicity", multiplicity, persistent=False)
        self._steps = self._schedule()
        self.double()

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

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able arguments that rebuild this module, beside the map and temperature."""
        return {
            "rotor": self._rotor.tolist(),
            "rigid": self._rigid.tolist(),
            "placement": self.placement.to_dict(),
            "defensive": self.base.weight,
            "temperatures_K": list(self.temperatures_K),
            **self.conditioner.config,
        }

    @classmethod
    def from_config(
        cls, cg_map: CGMap | TorsionMap, temperature_K: float, config: dict
    ) -> Backmapper:
        """Build an untrained backmapper from :attr:`config`."""
        placement = Placement.from_dict(config["placement"])
        return cls(cg_map, temperature_K, **{**config, "placement": placement})

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
        cls,
        cg_map: CGMap | TorsionMap,
        temperature_K: float,
        positions: Tensor,
        *,
        box: Tensor | None = None,
        hops: int = 3,
        **options: Any,
    ) -> Backmapper:
        """Build a backmapper whose coordinates are standardised by frames (n, n_atoms, 3) in Å.

        Dihedrals that spread over more than half a radian become rotors on the full circle; bonds
        and angles that don't move are held. Molecules must be whole; ``box`` holds the cell vectors
        as rows, (3, 3) or (n, 3, 3), of periodic frames.
        """
        frames = positions.double()
        few = frames[:: max(1, len(frames) // 200)].numpy()
        placement = build_placement(cg_map, hops=hops, positions=few)
        none = np.zeros(len(placement.atoms), dtype=bool)
        bare = cls(cg_map, temperature_K, rotor=none, placement=placement, hops=hops, width=1)
        points = bare.assembly.points(cg_map.apply(frames), frames)
        measured = bare.coordinates.measure(points).unbind(-1)
        statistics = coordinate_statistics(cg_map, placement, measured)
        backmapper = cls(
            cg_map,
            temperature_K,
            rotor=statistics.rotor,
            rigid=statistics.rigid,
            placement=placement,
            hops=hops,
            **options,
        )
        for name in ("location", "scale", "held"):
            getattr(backmapper.coordinates, name).copy_(getattr(statistics, name))
        some = slice(None, None, max(1, len(points) // _STATISTICS_FRAMES))
        box = None if box is None else box.double().expand(len(points), 3, 3)[some]
        backmapper.conditioner.set_statistics(points[some], box)
        return backmapper

    def forward(
        self, coarse: Tensor, *, temperature_K: float | None = None, box: Tensor | None = None
    ) -> BackmapDistribution:
        """Return q(x|s).

        Parameters
        ----------
        coarse
            Beads (*B, n_beads, 3) in Å, or torsions (*B, n_torsions) in rad.
        temperature_K
            The model's own by default.
        box
            Cell vectors as rows, (3, 3) or (*B, 3, 3) in Å: molecules are made whole, neighbours
            are found across the borders.

        Raises
        ------
        ValueError
            If the shape of s or the temperature isn't the model's, or s isn't finite.
        """
        inner = self.cg_map.coarse_shape
        if tuple(coarse.shape[coarse.ndim - len(inner) :]) != inner:
            raise ValueError(
                f"expected coarse variables of shape (..., {', '.join(map(str, inner))}), got "
                f"{tuple(coarse.shape)}: they belong to another mapping than this model"
            )
        if not torch.isfinite(coarse).all():
            raise ValueError("the coarse variables contain NaN or infinity")
        batch = coarse.shape[: coarse.ndim - len(inner)]
        temperature = None
        if temperature_K is not None:
            self._check_temperature(temperature_K)
            if temperature_K != self.temperature_K:
                temperature = coarse.new_full(batch, temperature_K)
        if box is not None:
            if self.whole is None:
                raise ValueError("torsions as coarse variables have no box")
            box = box.to(coarse).expand(*batch, 3, 3)
            coarse = self.whole(coarse, box)
        return BackmapDistribution(self, coarse, temperature, box)

    def _check_temperature(self, temperature_K: float) -> None:
        low, high = self.temperatures_K
        if not low - 1e-6 <= temperature_K <= high + 1e-6:
            held = f"at {low:g} K" if low == high else f"from {low:g} to {high:g} K"
            raise ValueError(
                f"this backmapper was trained {held} and holds there only; {temperature_K:g} K was "
                "asked for"
            )

    def sample_noise(self, rng: np.random.Generator, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw base noise (*shape, n_dof), float64: the same for the same generator everywhere."""
        masks = (self.normal_dof, self.rotor_dof, self.coordinates.charted)
        noise = self.base.sample(rng, shape, *(mask.cpu().numpy() for mask in masks))
        return noise[..., self.active.cpu()]

    def by_slot(self, noise: Tensor) -> Tensor:
        """Return noise (batch, n_dof) as (batch, n_slots, 3), zero where there is none."""
        where = torch.nonzero(self.active.flatten())[:, 0]
        zeros = noise.new_zeros(len(noise), self.active.numel())
        return zeros.index_copy(1, where, noise).unflatten(1, self.active.shape)

    def check_rigid(self, positions: Tensor) -> None:
        """Raise ValueError unless rigid coordinates of (batch, n_atoms, 3) are as they are held."""
        if self._rigid.any():
            points = self.assembly.points(self.cg_map.apply(positions), positions)
            slot = self.coordinates.first_unheld(points, torch.as_tensor(self._rigid))
            if slot is not None:
                label = atom_label(self.cg_map.atoms, self.placement.atoms[slot])
                raise ValueError(
                    f"the bond, angle or dihedral of {label} differs "
                    "from the value that this model holds it at: it was trained on frames with "
                    "constraints; give frames with the same ones"
                )

    # The two directions, for one flat batch. Noise and coordinates have shape (batch, n_slots, 3).

    def _condition(
        self, coarse: Tensor, temperature_K: Tensor | None, box: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Return what the conditioner knows of s, whatever the atoms."""
        log_temperature = None
        if temperature_K is not None:
            log_temperature = torch.log(temperature_K / self.temperature_K)
        encoded = self.conditioner.encode(coarse, box)
        return {"encoded": encoded, "coarse": coarse, "log_temperature": log_temperature}

    def internal_coordinates(self, positions: Tensor, coarse: Tensor) -> Tensor:
        """Return r, θ, φ of every slot, (batch, n_slots, 3), of atoms (batch, n_atoms, 3)."""
        points = self.assembly.points(coarse, positions)
        return self.coordinates.measure(points)

    def place_atoms(self, values: Tensor, coarse: Tensor) -> Tensor:
        """Return the atoms at given internal coordinates; inverse of `internal_coordinates`.

        Coordinates that aren't active are taken from s, or are what they are held at.
        """
        points, coordinates = self.assembly.first_points(coarse), self.coordinates
        values = coordinates.hold(values, coarse, torch.arange(values.shape[1]))
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
        y = y * self.coordinates.invariant[slots]
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

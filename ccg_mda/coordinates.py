"""The coordinates of placed atoms: which there are, what they are standardised by, what they hold.

Every slot has r, θ and φ (or Cartesian components). Each is one of

- *charted*: mapped onto the real line by a chart, its noise a standard normal;
- a *rotor*: a φ on the full circle;
- *free*: an angle from axes of the laboratory, uniform over directions;
- held: rigid in the data, a given torsion, or fixed by the frame of a molecule without beads.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap

from .placement import Placement, local_frames, measure
from .transforms import (
    N_PARAMETERS,
    TWO_PI,
    Affine,
    Chart,
    uniform_angle,
    uniform_angle_noise,
    wrap,
)

_LOG_2PI = math.log(TWO_PI)
_HELD_TO = 5e-3  # Å or rad; a trajectory in single precision, or rounded to 0.001 Å, passes
# Of shift, log-scale, coupling, skew and tail of three coordinates: those of the first alone.
_FIRST_ALONE = np.tile([1.0, 0.0, 0.0], 5) * (np.arange(15) // 3 != 2)


class Coordinates(nn.Module):
    """Internal coordinates of a placement; values have shape (batch, n_slots, 3).

    Parameters
    ----------
    cg_map, placement
        What is placed, and how.
    rotor, rigid
        Which φ go round the circle (n_slots,), and which coordinates are held (n_slots, 3).

    Attributes
    ----------
    active, rotor_dof, normal_dof
        Which coordinates have noise, and of which kind; shape (n_slots, 3).
    """

    def __init__(
        self,
        cg_map: CGMap | TorsionMap,
        placement: Placement,
        rotor: np.ndarray,
        rigid: np.ndarray,
    ) -> None:
        super().__init__()
        n, missing = len(placement.atoms), placement.references < 0
        if rotor.shape != (n,) or rigid.shape != (n, 3):
            raise ValueError(
                f"rotor needs {n} flags and rigid ({n}, 3), one per placed atom; got "
                f"{rotor.shape} and {rigid.shape}"
            )
        self._by_torsions = isinstance(cg_map, TorsionMap)
        # Without beads to orient it, a molecule is kept in a frame of its own.
        held = rigid | (missing & [False, True, True] & self._by_torsions)
        held[placement.torsion >= 0, 2] = True
        free = missing & [False, True, True] & ~placement.linear[:, None] & ~held
        circular = free & [False, False, True]
        circular[:, 2] |= rotor & ~held[:, 2]
        inside = placement.fragment[placement.atoms] >= 0
        index = {
            "references": placement.references,
            "point_of_slot": cg_map.n_beads + placement.atoms + cg_map.n_atoms * inside,
            "linear": placement.linear,
            "torsion": placement.torsion,
            "rotor": rotor,
            "free": free,
            "active": ~held,
            "rotor_dof": circular,
            "normal_dof": ~held & ~circular,
            "charted": ~held & ~circular & ~free,
            "invariant": ~(placement.linear[:, None] & missing[:, [1, 2, 2]]),
            "mapped": _mapped(~held & ~circular & ~free, placement.linear[:, None] & missing),
        }
        for name, value in index.items():
            self.register_buffer(name, torch.as_tensor(value), persistent=False)
        for name, initial in (("location", 0.0), ("scale", 1.0), ("held", 1.0)):
            self.register_buffer(name, torch.full((n, 3), initial))
        self.any_rotor, self._any_free = bool(rotor.any()), bool(free.any())

    def measure(self, points: Tensor) -> Tensor:
        """Return the coordinates of all slots at points (batch, n_points, 3)."""
        origin, frame = local_frames(points, self.references)
        return torch.stack(measure(origin, frame, points[:, self.point_of_slot], self.linear), -1)

    def first_unheld(self, points: Tensor, rigid: Tensor) -> int | None:
        """Return the first slot whose rigid coordinates differ from what they are held at."""
        error = self.measure(points) - self.held
        error[..., 2] = wrap(error[..., 2])
        off = ((error.abs() > _HELD_TO) & rigid).any(-1).any(0)
        return int(torch.nonzero(off)[0]) if off.any() else None

    def hold(self, values: Tensor, coarse: Tensor, slots: Tensor) -> Tensor:
        """Replace coordinates of slots that aren't active by what they are held at."""
        held = self.held[slots]
        if self._by_torsions:
            # φ is measured the other way round from a torsion; the first atoms lie in a plane.
            torsion, lab = self.torsion[slots], self.references[slots] < 0
            phi = torch.where(torsion >= 0, -coarse[:, torsion.clamp_min(0)], held[:, 2])
            phi = phi.masked_fill(lab[:, 2], 0.0)
            theta = held[:, 1].masked_fill(lab[:, 1], 0.5 * math.pi).expand_as(phi)
            held = torch.stack([held[:, 0].expand_as(phi), theta, phi], -1)
        return torch.where(self.active[slots], values, held)

    def affine(self, raw: Tensor, slots: Tensor, log_temperature: Tensor | None) -> Affine:
        """Return the map of charted coordinates of slots; the identity for all others."""
        raw = raw * self.mapped[slots]
        if log_temperature is not None:  # a harmonic coordinate widens as √T
            shift, width, rest = raw.split([3, 3, N_PARAMETERS - 6], -1)
            raw = torch.cat([shift, width + 0.5 * log_temperature[:, None, None], rest], -1)
        return Affine(raw)

    def _chart(self, slots: Tensor) -> Chart:
        return Chart(self.location[slots], self.scale[slots], self.linear[slots])

    def standardise(self, values: Tensor) -> Tensor:
        """Return the charted coordinates of all slots, standardised; zero for others."""
        r, theta, phi = self._regular(values).unbind(-1)
        chart = Chart(self.location, self.scale, self.linear)
        return chart.standardise(r, theta, phi).masked_fill(~self.charted, 0.0)

    def _regular(self, values: Tensor) -> Tensor:
        """Return coordinates with the φ that aren't charted at their centre."""
        phi = torch.where(self.charted[:, 2], values[..., 2], self.location[:, 2])
        return torch.cat([values[..., :2], phi[..., None]], -1)

    def noise(self, affine: Affine, values: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return noise and log-densities of charted and free coordinates, and ln |dx| (batch,)."""
        r, theta, phi = self._regular(values).unbind(-1)
        chart = Chart(self.location, self.scale, self.linear)
        noise, log_p = affine.noise(y)
        log_p = log_p - chart.log_derivatives(r, theta, phi)
        noise, log_p = (v.masked_fill(~self.charted, 0.0) for v in (noise, log_p))
        if self._any_free:
            z, log_uniform = uniform_angle_noise(theta)
            noise = torch.where(self.free, torch.stack([z, z, wrap(values[..., 2])], -1), noise)
            log_p = torch.where(self.free, _free_density(log_uniform), log_p)
        return noise, log_p, chart.log_volume(r, theta).sum(-1)

    def values(
        self, affine: Affine, noise: Tensor, rotor_phi: Tensor, coarse: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the coordinates of slots from noise and rotor angles; inverse of `noise`.

        Returns
        -------
        values, y, log_q
            Coordinates, their standardised form, and what they add to ln q, (batch,).
        """
        y, log_p = affine.coordinates(noise)
        y = y.masked_fill(~self.charted[slots], 0.0)
        chart = self._chart(slots)
        r, theta, phi = chart.coordinates(y)
        log_p = log_p - chart.log_derivatives(r, theta, phi)
        log_p = log_p.masked_fill(~self.charted[slots], 0.0)
        values = torch.stack([r, theta, torch.where(self.rotor[slots], rotor_phi, phi)], -1)
        if self._any_free:
            free = self.free[slots]
            theta, log_uniform = uniform_angle(noise[..., 1])
            values = torch.where(free, torch.stack([theta, theta, noise[..., 2]], -1), values)
            log_p = torch.where(free, _free_density(log_uniform), log_p)
        values = self.hold(values, coarse, slots)
        log_volume = chart.log_volume(values[..., 0], values[..., 1])
        return values, y, log_p.sum((-1, -2)) - log_volume.sum(-1)


def _free_density(log_uniform: Tensor) -> Tensor:
    """Log-density of θ and φ of a free direction, in the last two of three columns."""
    return torch.stack([log_uniform, log_uniform, torch.full_like(log_uniform, -_LOG_2PI)], -1)


def _mapped(charted: np.ndarray, lab: np.ndarray) -> np.ndarray:
    """Return which parameters of the affine map count, (n_slots, N_PARAMETERS), 1 or 0."""
    mapped = np.ones((len(charted), N_PARAMETERS))
    mapped[:, :3] = charted  # no shift, and no coupling of θ to r, where there is no coordinate
    mapped[:, 6] = charted[:, 1]
    # Cartesian components along axes of the laboratory stay an isotropic normal.
    mapped[lab[:, 2]] *= _FIRST_ALONE
    mapped[lab[:, 1]] = 0.0
    return mapped

"""Location, scale and character of every internal coordinate, from frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap

from .placement import Placement
from .sight import slot_kinds
from .transforms import Chart, wrap

_ROTOR_SPREAD = 0.5  # rad; a dihedral whose circular spread exceeds this is a rotor
_ROTOR_REACH = 2.0  # rad; and one that is ever this far from its mean: its far side isn't empty
_RIGID = 2e-4  # relative spread of a bond, or spread of an angle in rad, below which it is held
_LEAST_SCALE = 1e-3


@dataclass(frozen=True)
class Statistics:
    """What frames say about the coordinates of every slot, pooled over slots of one kind.

    Attributes
    ----------
    location, scale
        Of the chart of each coordinate (:class:`Chart`), shape (n_slots, 3).
    rotor
        Which φ go round the circle, shape (n_slots,).
    rigid
        Which coordinates don't move, shape (n_slots, 3).
    held
        Their values, shape (n_slots, 3): Å and rad.
    """

    location: Tensor
    scale: Tensor
    rotor: np.ndarray
    rigid: np.ndarray
    held: Tensor


def coordinate_statistics(
    cg_map: CGMap | TorsionMap,
    placement: Placement,
    coordinates: tuple[Tensor, Tensor, Tensor],
) -> Statistics:
    """Pool coordinates ``r, θ, φ``, each (n_frames, n_slots), by kind of slot."""
    r, theta, phi = coordinates
    linear = torch.as_tensor(placement.linear)
    kind = torch.as_tensor(slot_kinds(cg_map, placement))
    n_kinds = int(kind.max()) + 1 if len(kind) else 0

    def pooled(values: Tensor) -> Tensor:
        """Mean over frames and slots of each kind, at every slot."""
        count = torch.bincount(kind, minlength=n_kinds).to(values.real.dtype)
        sums = values.new_zeros(n_kinds).index_add(0, kind, values.mean(0))
        return (sums / count)[kind]

    def spread(values: Tensor, centre: Tensor) -> Tensor:
        return pooled((values - centre).square()).sqrt()

    resultant = pooled(torch.exp(1j * phi))
    circular_spread = torch.sqrt(-2.0 * torch.log(resultant.abs().clamp(1e-12, 1.0)))
    lab = (placement.references < 0)[:, 2] & ~placement.linear
    free = torch.as_tensor(lab | (placement.torsion >= 0))
    log_r, log_tan = Chart.flatten(torch.where(linear, 1.0, r), torch.where(linear, 1.0, theta))
    # Rigid means: the same in every frame, whatever the differences between slots of a kind.
    own = torch.exp(1j * phi).mean(0)
    half_own = 2.0 * torch.tan(0.5 * wrap(phi - own.angle()))
    moves = torch.stack([log_r.std(0), theta.std(0), half_own.std(0)], -1)
    rigid = (moves < _RIGID) & ~linear[:, None]
    rigid[free, 2] = False
    rigid[torch.as_tensor(placement.references[:, 1] < 0), 1] = False
    far = torch.zeros(n_kinds, dtype=bool)
    far[kind[(wrap(phi - resultant.angle()).abs() > _ROTOR_REACH).any(0)]] = True
    rotor = (circular_spread > _ROTOR_SPREAD) | far[kind]
    rotor &= ~linear & ~free & ~rigid[:, 2]

    centre = torch.where(rotor | free, 0.0, resultant.angle())
    half = 2.0 * torch.tan(0.5 * wrap(phi - centre))
    means = [pooled(v) for v in (log_r, log_tan)]
    location = torch.stack([*means, centre], -1)
    scales = [spread(v, m) for v, m in zip((log_r, log_tan), means, strict=True)]
    scale = torch.stack([*scales, spread(half, torch.zeros(()))], -1)
    if linear.any():
        plain = [pooled(v) for v in coordinates]
        widths = [spread(v, m) for v, m in zip(coordinates, plain, strict=True)]
        location = torch.where(linear[:, None], torch.stack(plain, -1), location)
        scale = torch.where(linear[:, None], torch.stack(widths, -1), scale)
        location, scale = _isotropic(location, scale, linear, placement.references)
    scale = scale.clamp_min(_LEAST_SCALE)
    scale[rotor | free, 2] = 1.0
    held = torch.stack([r.mean(0), theta.mean(0), own.angle()], -1)
    return Statistics(location, scale, rotor.numpy(), rigid.numpy(), held)


def _isotropic(
    location: Tensor, scale: Tensor, linear: Tensor, references: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Centre Cartesian components along axes of the laboratory, and give them one width."""
    square = location.square() + scale.square()
    for first in (1, 0):  # without p3 two components have no axes, without p2 all three
        chosen = linear & torch.as_tensor(references[:, 2 - (first == 0)] < 0)
        width = square[:, first:].mean(-1, keepdim=True).sqrt()
        location, scale = location.clone(), scale.clone()
        location[chosen, first:] = 0.0
        scale[chosen, first:] = width[chosen].expand(-1, 3 - first)
    return location, scale

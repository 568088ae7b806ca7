"""q(x|s) at given coarse variables, as a distribution with explicit noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .assembly import minimum_image

if TYPE_CHECKING:
    from .flow import Backmapper

_ON_FIBRE = 1e-3  # Å or rad


class BackmapDistribution:
    """q(x|s) at given beads or torsions; made by calling a :class:`Backmapper`.

    Batch shape B is the shape of s before its last dimensions; sample shapes S come in front of it.
    Densities are with respect to the volume of the fibre {x : M x = s} in Å, such that the
    volume of all atoms is that of the beads times it. Where s are torsions, rigid motions are
    left out; rigid bonds and angles are numbers, not coordinates.

    Parameters
    ----------
    backmapper
        The flow.
    coarse
        Beads (*B, n_beads, 3) in Å, molecules whole, or torsions (*B, n_torsions) in rad.
    temperature_K
        Of every frame (*B), or None for the model's own.
    box
        Cell vectors of every frame (*B, 3, 3) in Å, or None.
    """

    def __init__(
        self,
        backmapper: Backmapper,
        coarse: Tensor,
        temperature_K: Tensor | None = None,
        box: Tensor | None = None,
    ) -> None:
        self.backmapper, self.coarse = backmapper, coarse
        self.temperature_K, self.box = temperature_K, box
        self.batch_shape = coarse.shape[: coarse.ndim - len(backmapper.cg_map.coarse_shape)]

    def _flat(self, values: Tensor | None, shape: torch.Size) -> Tensor | None:
        """Repeat values of every frame over samples, as one flat batch."""
        if values is None:
            return None
        inner = values.shape[len(self.batch_shape) :]
        return values.expand(*shape, *inner).reshape(-1, *inner)

    def _conditions(self, shape: torch.Size) -> dict[str, Tensor | None]:
        return {
            "temperature_K": self._flat(self.temperature_K, shape),
            "box": self._flat(self.box, shape),
        }

    def positions_and_log_prob_from(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions (*S, *B, n_atoms, 3) and ln q (*S, *B) of ``noise`` (*S, *B, n_dof)."""
        shape, flow = noise.shape[:-1], self.backmapper
        coarse = self._flat(self.coarse, shape)
        slots = flow.by_slot(noise.reshape(-1, flow.n_dof))
        positions, log_q = flow.from_noise(coarse, slots, **self._conditions(shape))
        return positions.reshape(*shape, -1, 3), log_q.reshape(shape)

    def positions_from(self, noise: Tensor) -> Tensor:
        """Return the positions of ``noise``: smooth in noise and coarse variables."""
        return self.positions_and_log_prob_from(noise)[0]

    def noise_and_log_prob_from(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return noise (*S, *B, n_dof) and ln q (*S, *B) of positions (*S, *B, n_atoms, 3).

        Raises
        ------
        ValueError
            If the positions do not map onto s (by more than 0.001 Å or rad, up to whole cells), or
            a bond or angle that the model holds rigid has another value.
        """
        shape, flow = positions.shape[:-2], self.backmapper
        mapped = flow.cg_map.apply(positions)
        error = flow.cg_map.difference(mapped, self.coarse)
        if self.box is not None:
            error = minimum_image(error, self.box)
        if not error.abs().max() < _ON_FIBRE:
            raise ValueError(
                f"the positions map to other coarse variables than given (off by up to "
                f"{error.abs().max():.3g}): the density is defined on the fibre M x = s only"
            )
        flow.check_rigid(positions.reshape(-1, *positions.shape[-2:]))
        # In a box, positions may lie in other cells than the beads: take the beads beside them.
        coarse = self.coarse if self.box is None else mapped
        noise, _, log_q = flow.to_noise_terms(
            positions.reshape(-1, *positions.shape[-2:]),
            self._flat(coarse, shape),
            **self._conditions(shape),
        )
        return noise[:, flow.active].reshape(*shape, flow.n_dof), log_q.reshape(shape)

    def noise_from(self, positions: Tensor) -> Tensor:
        """Return the noise of positions; inverse of :meth:`positions_from`."""
        return self.noise_and_log_prob_from(positions)[0]

    def log_prob(self, positions: Tensor) -> Tensor:
        """Return ln q(x|s), shape (*S, *B)."""
        return self.noise_and_log_prob_from(positions)[1]

    def rsample_and_log_prob(
        self, shape: tuple[int, ...] = (), rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw positions (*shape, *B, n_atoms, 3) with ln q; differentiable in s."""
        rng = np.random.default_rng() if rng is None else rng
        noise = self.backmapper.sample_noise(rng, (*shape, *self.batch_shape))
        return self.positions_and_log_prob_from(noise.to(self.coarse))

    def rsample(
        self, shape: tuple[int, ...] = (), rng: np.random.Generator | None = None
    ) -> Tensor:
        """Draw positions (*shape, *B, n_atoms, 3)."""
        return self.rsample_and_log_prob(shape, rng)[0]

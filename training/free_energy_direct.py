"""Where to draw coarse states for the free energy of every bin: evenly, for flows over torsions.

A proposal says how states s of a bin are drawn and with which weight: P(bin) is
exp(log_share) E[Ẑ(s) exp(log_offset)], up to one factor for all bins.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from .free_energy_grid import Grid

# Roberts' sequence: the generalised golden ratio fills a square evenly, however many points.
_GOLDEN = {1: (0.6180339887498949,), 2: (0.7548776662466927, 0.5698402909980532)}


class Drawn(NamedTuple):
    """Coarse states drawn in n bins, K each.

    Attributes
    ----------
    states
        (n, K, ...): torsions in rad, or beads in Å.
    log_offset
        What is added to -U/kT - ln q, (n, K).
    cluster
        States of one number are not independent, (n, K).
    """

    states: np.ndarray
    log_offset: np.ndarray
    cluster: np.ndarray


class Proposal(Protocol):
    """How the states of a bin are drawn."""

    grid: Grid
    log_share: np.ndarray
    log_share_replicas: np.ndarray
    known: np.ndarray

    def draw(
        self, points: np.ndarray, first: int, n_samples: int, rng: np.random.Generator
    ) -> Drawn:
        """Draw samples ``first`` to ``first + n_samples`` of bins (n,)."""
        ...


class EvenlyInBin:
    """Torsions spread evenly over a bin, so that the mean of the weights is that of Z over the bin.

    Parameters
    ----------
    grid
        Over all torsions of a `TorsionMap`, in its order.
    extent
        Share of the bin's width that the states fill: 1 for the average over the bin, 0 for the
        value at its centre.

    Attributes
    ----------
    log_share, log_share_replicas
        Zero, (n_points,) and (1, n_points): bins are equal in size, exactly.
    known
        Bins that states can be drawn in, (n_points,): all.
    """

    def __init__(self, grid: Grid, extent: float = 1.0) -> None:
        self.grid, self.extent = grid, extent
        self.log_share = np.zeros(grid.n_points)
        self.log_share_replicas = np.zeros((1, grid.n_points))
        self.known = np.ones(grid.n_points, dtype=bool)
        # One lattice in all bins would make one error of all their sums: each has a shift.
        self._shift = np.random.default_rng(0).random((grid.n_points, 1, len(grid.edges)))

    def draw(
        self, points: np.ndarray, first: int, n_samples: int, rng: np.random.Generator
    ) -> Drawn:
        """Draw samples ``first`` to ``first + n_samples`` of bins (n,); see `Proposal`."""
        dimensions = len(self.grid.edges)
        number = np.arange(first, first + n_samples)
        if dimensions in _GOLDEN:
            place = (self._shift[points] + np.outer(number, _GOLDEN[dimensions])) % 1.0
        else:
            place = rng.random((len(points), n_samples, dimensions))
        offset = self.extent * (place - 0.5) * self.grid.widths
        return Drawn(
            self.grid.centres[points][:, None] + offset,
            np.zeros((len(points), n_samples)),
            np.broadcast_to(number, (len(points), n_samples)),
        )

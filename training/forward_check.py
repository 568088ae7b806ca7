"""Forward check: do frames of p(x|s) have the log-weights that samples of q(x|s) promise.

Samples of q can't see a mode that q has dropped: their weights are even, and ln Z(s) is too small
by the share of that mode. Held-out frames can (theory 5.5). Each is a sample of p(x|s) at its own
s; K samples of q are drawn there, and the frame's log-weight l is compared with ln Ẑ(s) and with
what the reweighted samples say that it should be. A verdict on a labelled state takes the frames
near it together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import nn

from ccg_ase.topology import Topology
from ccg_ase.units import thermal_energy
from ccg_mda.bounds import normalised_weights
from ccg_mda.weights import log_mean_exp

from .reconstruction import reconstruct
from .reference import ReferenceData
from .states import choose_states, state_features
from .thresholds import Gates

_MOST_NATS = 600.0  # above ln Ẑ; exp of it is finite, and so is that of its sum over frames


@dataclass(frozen=True, eq=False)
class Neighbourhoods:
    """What the held-out frames near each of S states say of the flow there.

    Attributes
    ----------
    n_frames
        How many there are, (S,); where there is none, the other figures are NaN.
    missed
        Share of frames with a weight at least as large as all K samples at the same s together:
        K samples have missed where they are. Of a flow with n effective samples it is at most
        1/n on average (Markov's inequality), and far less for weights without a heavy tail.
    forward_ess
        1/(E_p[w] E_p[1/w]), a fraction, with w = exp(l)/Ẑ.
    surplus, surplus_error
        Mean over frames of l - E_p[l], with E_p[l] from reweighted samples, in nats, and its
        standard error.
    """

    n_frames: np.ndarray
    missed: np.ndarray
    forward_ess: np.ndarray
    surplus: np.ndarray
    surplus_error: np.ndarray

    @property
    def unchecked(self) -> np.ndarray:
        """States without a frame nearby, (S,) bool: nothing is known of dropped modes there."""
        return self.n_frames == 0

    def failed(self, gates: Gates) -> np.ndarray:
        """Return the states whose samples can't be trusted, (S,) bool; none of the unchecked."""
        high = self.surplus - 3 * self.surplus_error > gates.max_surplus
        lost = (self.missed > gates.max_missed) | (self.forward_ess < gates.min_forward_ess)
        return (high | lost) & ~self.unchecked


@dataclass(frozen=True, eq=False)
class ForwardCheck:
    """Held-out frames, and the samples of the flow at the same s.

    Attributes
    ----------
    beads
        s of the frames, (M, n_beads, 3) in Å or (M, n_torsions) in rad.
    excess
        l - ln Ẑ(s) of the frames, (M,); infinite where the flow has no density at all.
    expected, variance
        Mean and variance over p(x|s) of the same, from reweighted samples, (M,).
    n_samples
        K.
    n_calls
        Energy calls spent.
    """

    beads: np.ndarray
    excess: np.ndarray
    expected: np.ndarray
    variance: np.ndarray
    n_samples: int
    n_calls: int

    @classmethod
    def from_frames(
        cls,
        backmapper: nn.Module,
        potential: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        frames: ReferenceData,
        n_samples: int,
        rng: np.random.Generator,
        *,
        batch_size: int = 1024,
    ) -> ForwardCheck:
        """Draw K samples at the s of each frame.

        Parameters
        ----------
        backmapper, potential, batch_size
            As in `reconstruct`.
        frames
            Frames of p(x) with energies, which the flow wasn't fitted to.
        n_samples, rng
            K, and the source of the noise.
        """
        beads = backmapper.cg_map.apply(frames.positions)
        drawn = reconstruct(backmapper, potential, beads, n_samples, rng, batch_size=batch_size)
        log_z, _ = log_mean_exp(drawn.log_weight, axis=1)
        with np.errstate(invalid="ignore"):  # no sample has weight: every frame is missed
            relative = drawn.log_weight - log_z[:, None]
            excess = _log_weight(backmapper, frames, batch_size) - log_z
        weight = normalised_weights(drawn.log_weight)
        relative = np.where(weight > 0, relative, 0.0)
        expected = (weight * relative).sum(1)
        variance = (weight * (relative - expected[:, None]) ** 2).sum(1)
        # The expectation itself comes from samples: their effective number adds its share.
        variance = variance * (1 + (weight**2).sum(1))
        excess = np.where(np.isfinite(log_z), excess, np.inf)
        return cls(beads, excess, expected, variance, n_samples, drawn.n_calls)

    def near(self, states: np.ndarray, topology: Topology | None, gates: Gates) -> Neighbourhoods:
        """Compare frames and samples near each state.

        Parameters
        ----------
        states
            (S, n_beads, 3) in Å, or (S, n_torsions) in rad.
        topology
            Of the beads; None where states are torsions.
        gates
            `radius` of it.
        """
        features = state_features(np.concatenate([self.beads, states]), topology)
        here, there = features[: len(self.beads)], features[len(self.beads) :]
        if not here.shape[1]:  # one bead has no shape: all states are the same
            here, there = np.zeros((len(here), 1)), np.zeros((len(there), 1))
        pairs = cKDTree(here).query_ball_point(there, gates.radius)
        n_frames = np.array([len(found) for found in pairs], dtype=int)
        state, frame = np.repeat(np.arange(len(states)), n_frames), np.concatenate(pairs)
        frame = frame.astype(int)

        def mean(values: np.ndarray) -> np.ndarray:
            total = np.bincount(state, values[frame], minlength=len(states))
            return np.where(n_frames > 0, total / np.maximum(n_frames, 1), np.nan)

        excess = np.clip(self.excess, -_MOST_NATS / 2, _MOST_NATS / 2)
        product = mean(np.exp(excess)) * mean(np.exp(-excess))
        return Neighbourhoods(
            n_frames=n_frames,
            missed=mean((self.excess >= np.log(self.n_samples)).astype(float)),
            forward_ess=1 / product,
            surplus=mean(excess - self.expected),
            surplus_error=np.sqrt(mean(self.variance) / np.maximum(n_frames, 1)),
        )


def choose_frames(
    beads: np.ndarray, n_frames: int, topology: Topology | None, seed: int
) -> np.ndarray:
    """Choose the frames of a check, half as they come, half as diverse as possible.

    Parameters
    ----------
    beads
        s of all held-out frames, as in `choose_states`.
    n_frames
        How many; all of them, where there are fewer.
    topology, seed
        As in `choose_states`.

    Returns
    -------
    ndarray
        Ascending indices.
    """
    return choose_states(beads, min(n_frames, len(beads)), topology, diverse=0.5, seed=seed)


def _log_weight(backmapper: nn.Module, frames: ReferenceData, batch_size: int) -> np.ndarray:
    """Return l of frames, (M,); infinite where the flow doesn't reach."""
    x, log_prob = torch.from_numpy(frames.positions), []
    with torch.no_grad():
        for part in x.split(batch_size):
            log_prob.append(backmapper(backmapper.cg_map.apply(part)).log_prob(part))
    log_q = torch.cat(log_prob).numpy().astype(np.float64)
    log_q = np.where(np.isnan(log_q), -np.inf, log_q)
    return -frames.energy / thermal_energy(backmapper.temperature_K) - log_q

"""Reconstructions for every bin of a grid, in portions that are kept: more where they matter.

A first look at every bin tells which ones are clearly above the cut-off: they get no further call.
The others get the number of samples asked for, and those whose weights are still too uneven twice
as many again and again, up to a limit. A portion is a pure function of the arguments and of the
portions before it, written in one step: whoever is interrupted ends in the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ccg_ase.devices import device_of
from ccg_ase.units import thermal_energy
from ccg_mda.bounds import log_partition
from ccg_mda.potential import Potential

from .free_energy_direct import Proposal
from .labels import accept
from .reference import read_npz, write_npz

Tick = Callable[[int, int, str], None]
_MARGIN_KT = 2.0  # above the cut-off, beside three standard errors, to be left after a first look
_FARTHEST_A = 1e6


@dataclass(frozen=True)
class Sampling:
    """How many reconstructions a bin gets, and which weights are good enough.

    Attributes
    ----------
    n_first
        Samples of the first look, at least two.
    n_samples, n_most
        Samples of every bin below the cut-off, and the most that one gets.
    max_kT
        Cut-off above the lowest bin.
    min_effective, max_pareto_k
        Gate: least number of effective samples, and largest tail shape of the weights.
    max_calls
        Most energy calls; None: no limit. The lowest bins are served first.
    seed
        Of the noise.
    portion
        Bins per file, the most that an interruption loses.
    """

    n_first: int = 8
    n_samples: int = 64
    n_most: int = 512
    max_kT: float = 12.0
    min_effective: float = 15.0
    max_pareto_k: float = 0.7
    max_calls: int | None = None
    seed: int = 0
    portion: int = 48

    def __post_init__(self) -> None:
        if not 2 <= self.n_first <= self.n_samples <= self.n_most:
            raise ValueError(
                f"numbers of samples must ascend from 2: first {self.n_first}, then "
                f"{self.n_samples}, at most {self.n_most}"
            )


class BinSamples(NamedTuple):
    """Samples of one bin, (K,) each: l with the offset, U in eV, and clusters of states."""

    log_weight: np.ndarray
    energy: np.ndarray
    cluster: np.ndarray


class Sampled(NamedTuple):
    """Samples of all bins.

    Attributes
    ----------
    bins
        One `BinSamples` per bin; empty where no state is known.
    passed
        Which bins pass the gate, (n_points,).
    above
        Which bins are clearly above the cut-off, (n_points,).
    n_calls
        Energy calls, those of an interrupted run included.
    """

    bins: list[BinSamples]
    passed: np.ndarray
    above: np.ndarray
    n_calls: int


def sample_grid(
    backmapper: nn.Module,
    potential: Potential,
    proposal: Proposal,
    folder: Path,
    settings: Sampling,
    *,
    origin: str,
    tick: Tick | None = None,
) -> Sampled:
    """Reconstruct atoms in every bin until its weights can be trusted, or the limit is reached.

    Parameters
    ----------
    backmapper, potential
        Where atoms and energies come from.
    proposal
        How states of a bin are drawn.
    folder
        Keeps the portions; call again with the same arguments to continue.
    settings
        Numbers of samples and gates.
    origin
        Says what model and proposal these are; portions of another origin are never used.
    tick
        Called with calls done, calls known to be needed, and a note.

    Raises
    ------
    ValueError
        If the limit of calls doesn't even allow the first look.
    """
    n_points = proposal.grid.n_points
    known = np.flatnonzero(proposal.known)
    if settings.max_calls is not None and len(known) * settings.n_first > settings.max_calls:
        raise ValueError(
            f"{len(known)} bins need {len(known) * settings.n_first} energy calls for a first "
            f"look, more than the {settings.max_calls} allowed: fewer bins, or more calls"
        )
    text = json.dumps([origin, asdict(settings)], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    state = _State(n_points)
    turn, wanted = 0, known
    more = settings.n_first
    while len(wanted):
        if settings.max_calls is not None:
            wanted = np.sort(wanted[: (settings.max_calls - state.n_calls) // more])
            if not len(wanted):
                break
        planned = state.n_calls + len(wanted) * more
        for part, start in enumerate(range(0, len(wanted), settings.portion)):
            points = wanted[start : start + settings.portion]
            path = folder / f"{name}_{turn:02d}_{part:05d}.npz"
            if not path.exists():
                rng = np.random.default_rng([settings.seed, turn, part])
                portion = _portion(backmapper, potential, proposal, points, state.size, more, rng)
                write_npz(path, portion)
            state.add(points, read_npz(path))
            if tick is not None:
                tick(state.n_calls, planned, f"round {turn + 1}, {len(wanted)} bins")
        turn += 1
        wanted, more = _next(proposal, state, settings)
    return Sampled(
        [state.samples(point) for point in range(n_points)],
        state.passed(settings),
        _above(proposal, state, settings),
        state.n_calls,
    )


class _State:
    """All samples so far."""

    def __init__(self, n_points: int) -> None:
        self.parts: list[list[BinSamples]] = [[] for _ in range(n_points)]
        self.size = np.zeros(n_points, dtype=int)
        self.n_calls = 0

    def add(self, points: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
        for row, point in enumerate(points):
            columns = (arrays[field][row] for field in BinSamples._fields)
            self.parts[point].append(BinSamples(*columns))
        self.size[points] += arrays["energy"].shape[1]
        self.n_calls += arrays["energy"].size

    def samples(self, point: int) -> BinSamples:
        if not self.parts[point]:
            return BinSamples(*np.zeros((3, 0)))
        return BinSamples(*map(np.concatenate, zip(*self.parts[point], strict=True)))

    def passed(self, settings: Sampling) -> np.ndarray:
        return np.array(
            [
                good_enough(self.samples(point).log_weight, settings)
                for point in range(len(self.size))
            ]
        )


def good_enough(log_weight: np.ndarray, settings: Sampling) -> bool:
    """Tell whether weights (K,) pass the gate: enough effective samples, and no heavy tail."""
    if len(log_weight) < 2:
        return False
    share = settings.min_effective / len(log_weight)
    good = accept(log_weight[None], min_ess=share, max_pareto_k=settings.max_pareto_k)
    return bool(good[0])


def _portion(
    backmapper: nn.Module,
    potential: Potential,
    proposal: Proposal,
    points: np.ndarray,
    size: np.ndarray,
    n_samples: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Draw states, atoms and energies of some bins that have equally many samples so far."""
    drawn = proposal.draw(points, int(size[points[0]]), n_samples, rng)
    states = drawn.states.reshape(-1, *drawn.states.shape[2:])
    log_weight, energy, _ = weigh(backmapper, potential, states, rng)
    return {
        "log_weight": log_weight.reshape(drawn.log_offset.shape) + drawn.log_offset,
        "energy": energy.reshape(drawn.log_offset.shape),
        "cluster": np.array(drawn.cluster),
    }


def weigh(
    backmapper: nn.Module,
    potential: Potential,
    states: np.ndarray,
    rng: np.random.Generator,
    *,
    batch_size: int = 1024,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reconstruct one sample at each coarse state, without labels.

    Parameters
    ----------
    backmapper, potential
        As in `sample_grid`.
    states
        (N, ...) torsions in rad, or beads in Å.
    rng
        Source of the noise.
    batch_size
        Samples per pass; it doesn't change the noise.

    Returns
    -------
    log_weight, energy, positions
        l = -U/kT - ln q, (N,), U in eV, (N,), and atoms in Å, (N, n_atoms, 3).
    """
    kT = thermal_energy(backmapper.temperature_K)
    noise = backmapper.sample_noise(rng, (len(states),))
    pieces = []
    for start in range(0, len(states), batch_size):
        own = slice(start, start + batch_size)
        with torch.no_grad():
            here = torch.from_numpy(np.array(states[own], dtype=np.float64))
            at = backmapper(here.to(device_of(backmapper)))
            x, log_prob = at.positions_and_log_prob_from(noise[own])
        positions, log_q = x.cpu().numpy(), log_prob.cpu().numpy()
        near = (np.abs(positions) < _FARTHEST_A).all((1, 2)) & np.isfinite(log_q)
        energy = np.full(len(positions), np.inf)
        if near.any():
            energy[near] = potential(positions[near])[0]
        pieces.append((np.where(near, -energy / kT - log_q, -np.inf), energy, positions))
    return tuple(np.concatenate(column) for column in zip(*pieces, strict=True))


def _log_shares(proposal: Proposal, state: _State) -> tuple[np.ndarray, np.ndarray]:
    """Return ln P of every bin, unnormalised, and its error from the samples, (n_points,) each."""
    value = np.full(len(state.size), -np.inf)
    error = np.full(len(state.size), np.inf)
    for point in np.flatnonzero(state.size):
        estimate = log_partition(state.samples(point).log_weight[None])
        value[point], error[point] = estimate.value[0], estimate.error[0]
    return value + proposal.log_share, error


def _above(proposal: Proposal, state: _State, settings: Sampling) -> np.ndarray:
    """Tell which bins are clearly above the cut-off: by the margin, and by three errors."""
    value, error = _log_shares(proposal, state)
    finite = np.isfinite(value)
    passed = state.passed(settings) & finite
    lowest = value[passed if passed.any() else finite].max(initial=-np.inf)
    with np.errstate(invalid="ignore"):
        clear = value + 3 * error + _MARGIN_KT < lowest - settings.max_kT
    beyond = passed & (value < lowest - settings.max_kT)
    return (clear | beyond) & proposal.known


def _next(proposal: Proposal, state: _State, settings: Sampling) -> tuple[np.ndarray, int]:
    """Return the bins that need more samples, lowest first, and how many each."""
    open_bins = ~_above(proposal, state, settings) & proposal.known
    open_bins &= ~state.passed(settings) | (state.size < settings.n_samples)
    open_bins &= state.size < settings.n_most
    if not open_bins.any():
        return np.zeros(0, dtype=int), 0
    smallest = int(state.size[open_bins].min())
    target = settings.n_samples if smallest < settings.n_samples else 2 * smallest
    points = np.flatnonzero(open_bins & (state.size == smallest))
    order = np.argsort(-_log_shares(proposal, state)[0][points], kind="stable")
    return points[order], min(target, settings.n_most) - smallest

"""How consistent both models are: the distribution of the joint residual, from both sides.

R = -l - βF_φ(s) - c, l = -βU - ln q(x|s), is zero for all x iff both models are exact (theory 5.4).
Forward means x ~ p, on held-out frames: it sees what the models miss. Reverse means x ~ q at
s ~ exp(-βF_φ): it sees what they make up. Both have one c, the forward median, so that the reverse
median is their gap: that of the bounds of ln Z (E1).

Over K samples at every state, the law of total variance splits R: the spread at fixed s is the
flow's, E_s Var(R|s), and the spread of its mean across s is that of F_φ against the mean of -l.
The slope along s at fixed noise is β(f_φ - label), zero too where both are exact. It is split in
the same way: scatter of the labels (flow) and error of their mean (force field).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ccg_ase.energies import bead_energies
from ccg_ase.forcefield import ForceField
from ccg_ase.units import thermal_energy
from ccg_mda.flow import Backmapper
from ccg_mda.weights import block_starts

from .reconstruction import pull_back_frames
from .reference import write_npz
from .samples import Samples

if TYPE_CHECKING:
    from .progress import Stage
    from .stages import Metrics
    from .workspace import Workspace

_MOST_FRAMES = 4000  # held-out frames that are measured: their errors are small enough then
BEYOND_KT = (1, 2, 4)
_ONE_SIGMA = (15.865525, 50.0, 84.134475)  # percentiles of a normal distribution
_TAILS = (0.5, 5.0, 95.0, 99.5)
_NORMAL_TAILS = 5.151659  # from 0.5 % to 99.5 %, in standard deviations


@dataclass(frozen=True, eq=False)
class Residual:
    """The joint residual of samples, without its constant.

    Attributes
    ----------
    value
        R + c, (S, K), in kT; +inf where the energy is not finite.
    slope
        Its gradient along s at fixed noise, (S, K, n_beads, 3), kT/Å.
    """

    value: np.ndarray
    slope: np.ndarray

    @classmethod
    def of(cls, samples: Samples, force_field: ForceField) -> Residual:
        """Work it out for samples of a flow, or for frames (`pull_back_frames`, K = 1)."""
        kt = thermal_energy(samples.temperature_K)
        energy, force = bead_energies(force_field, samples.beads)
        slope = (force[:, None] - samples.labels) / kt
        value = -samples.log_weight - energy[:, None] / kt
        return cls(np.where(np.isfinite(value), value, np.inf), slope)


@dataclass(frozen=True, eq=False)
class Consistency:
    """Figures of the joint residual, and what its histogram needs.

    Attributes
    ----------
    figures
        Each with a standard error beside it, ``_error``. After ``forward_`` and ``reverse_``, in
        kT: ``median``; ``width``, half the distance of the 16th and 84th percentiles, and ``rms``
        about c; ``skew``, that of the 5th and 95th percentiles about the median, in (-1, 1);
        ``tails``, the distance of the 0.5th and 99.5th percentiles in widths over that of a normal
        distribution; ``beyond_1``, ``beyond_2``, ``beyond_4``, shares further than so many kT from
        zero, samples of infinite energy included; ``lost``, the share of these, which nothing
        else counts. ``slope``, root mean square per component, kT/Å. Where K > 1 also
        ``spread_flow`` and ``spread_force_field`` (kT), ``slope_flow`` and ``slope_force_field``
        (kT/Å): root mean squares at fixed s and across s. The latter two are what is left after
        the noise of K samples is taken off, and zero where that is more.
    forward, reverse
        R of all frames and of all samples, flat, in kT.
    """

    figures: dict[str, float]
    forward: np.ndarray
    reverse: np.ndarray


def consistency(
    forward: Residual,
    reverse: Residual,
    *,
    n_blocks: int = 20,
    n_bootstrap: int = 200,
    seed: int = 0,
) -> Consistency:
    """Collect the figures of the joint residual from both sides.

    Parameters
    ----------
    forward
        Of held-out frames, in the order of time.
    reverse
        Of reconstructions of the bead ensemble, in the order of the bead trajectory.
    n_blocks
        Runs of consecutive states that count as independent: a block must outlast correlations.
    n_bootstrap, seed
        Draws of blocks for the errors; c is drawn along.

    Raises
    ------
    ValueError
        If one side has fewer states than two.
    """
    sides = {"forward": _Columns.of(forward), "reverse": _Columns.of(reverse)}
    fewest = min(len(side.value) for side in sides.values())
    if fewest < 2:
        raise ValueError(f"the joint residual needs two states or more, got {fewest}")

    def figures(pick: Callable[[_Columns], _Columns]) -> dict[str, float]:
        picked = {name: pick(side) for name, side in sides.items()}
        zero = picked["forward"].median()
        return {
            f"{side}_{name}": value
            for side, columns in picked.items()
            for name, value in columns.figures(zero).items()
        }

    rng = np.random.default_rng(seed)
    found = figures(lambda side: side)
    draws = [figures(lambda side: side.resampled(n_blocks, rng)) for _ in range(n_bootstrap)]
    values = np.array([list(draw.values()) for draw in draws])
    error = dict(zip(found, np.nanstd(values, axis=0, ddof=1), strict=True))
    told = {
        k: v for name in found for k, v in ((name, found[name]), (f"{name}_error", error[name]))
    }
    zero = sides["forward"].median()
    return Consistency(
        {name: float(value) for name, value in told.items()},
        forward.value.ravel() - zero,
        reverse.value.ravel() - zero,
    )


def check_consistency(workspace: Workspace, stage: Stage, k: int) -> Metrics:
    """Measure the last models on held-out frames and on the reconstructed bead ensemble.

    A stage: after the final reconstruction; leaves ``consistency.npz`` beside it, the residuals
    ``forward`` and ``reverse`` in kT for the report's histogram. It needs no energy calls.
    """
    model, folder = workspace.final_model(k), workspace.final(k)
    flow, force_field = Backmapper.from_model(model), ForceField.from_model(model)
    _, held_out = workspace.data
    n = len(held_out)
    frames = held_out[np.linspace(0, n - 1, min(n, _MOST_FRAMES)).astype(int)]
    parts = []
    for piece in np.array_split(np.arange(len(frames)), -(-len(frames) // 500)):
        part = frames[piece]
        parts.append(pull_back_frames(flow, part.positions, part.energy, part.forces))
        stage.update(int(piece[-1]) + 1, len(frames))
    found = consistency(
        Residual.of(Samples.concatenate(*parts), force_field),
        Residual.of(Samples.load(folder / "samples.npz"), force_field),
        seed=workspace.seed(0, 15),
    )
    write_npz(folder / "consistency.npz", {"forward": found.forward, "reverse": found.reverse})
    return {"states": len(frames), **found.figures}


@dataclass(frozen=True, eq=False)
class _Columns:
    """What the figures need of every state: R + c (S, K), and mean squares of the slope (S,)."""

    value: np.ndarray
    slope_square: np.ndarray
    slope_scatter: np.ndarray

    @classmethod
    def of(cls, residual: Residual) -> _Columns:
        finite = np.isfinite(residual.value)
        count = finite.sum(1)
        slope = residual.slope.reshape(*finite.shape, -1)
        slope = np.where(finite[..., None], slope, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):  # states with too few samples: NaN
            mean = slope.sum(1) / count[:, None]
            deviation = np.where(finite[..., None], slope - mean[:, None], 0.0)
            scatter = np.square(deviation).sum(1).mean(-1) / (count - 1)
            return cls(residual.value, np.square(slope).sum(1).mean(-1) / count, scatter)

    def median(self) -> float:
        return float(np.median(self.value))

    def resampled(self, n_blocks: int, rng: np.random.Generator) -> _Columns:
        """Draw as many blocks of states as there are, with replacement."""
        n = len(self.value)
        blocks = np.split(np.arange(n), block_starts(n, min(n_blocks, n))[1:])
        drawn = np.concatenate([blocks[i] for i in rng.integers(len(blocks), size=len(blocks))])
        return _Columns(self.value[drawn], self.slope_square[drawn], self.slope_scatter[drawn])

    def figures(self, zero: float) -> dict[str, float]:
        every = self.value - zero
        finite = np.isfinite(every)
        flat = every[finite]
        low, median, high = np.percentile(flat, _ONE_SIGMA)
        least, fifth, last_fifth, most = np.percentile(flat, _TAILS)
        width = 0.5 * (high - low)
        found = {
            "median": median,
            "width": width,
            "rms": np.sqrt(np.square(flat).mean()),
            "skew": _ratio(fifth + last_fifth - 2 * median, last_fifth - fifth),
            "tails": _ratio(most - least, _NORMAL_TAILS * width),
            **{f"beyond_{k}": np.mean(np.abs(every) > k) for k in BEYOND_KT},
            "lost": 1.0 - finite.mean(),
            "slope": np.sqrt(np.nanmean(self.slope_square)),
        }
        if every.shape[1] > 1:
            found |= self._split(every, finite)
        return found

    def _split(self, every: np.ndarray, finite: np.ndarray) -> dict[str, float]:
        """Split mean squares into those at fixed s and across s (one-way analysis of variance)."""
        count = finite.sum(1)
        enough = count > 1
        if enough.sum() < 2:
            names = ("spread_flow", "spread_force_field", "slope_flow", "slope_force_field")
            return dict.fromkeys(names, np.nan)
        count, kept = count[enough], np.where(finite, every, 0.0)[enough]
        mean = kept.sum(1) / count
        square = np.where(finite[enough], kept - mean[:, None], 0.0) ** 2
        within = square.sum(1) / (count - 1)
        across = mean.var(ddof=1) - (within / count).mean()
        scatter, slope_square = self.slope_scatter[enough], self.slope_square[enough]
        return {
            "spread_flow": np.sqrt(within.mean()),
            "spread_force_field": np.sqrt(max(0.0, across)),
            "slope_flow": np.sqrt(scatter.mean()),
            "slope_force_field": np.sqrt(max(0.0, (slope_square - scatter).mean())),
        }


def _ratio(above: float, below: float) -> float:
    """Return a ratio; NaN where models that are exact leave nothing to divide by."""
    return above / below if below > 0 else np.nan

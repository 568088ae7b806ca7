"""Do samples cover the torsions that atoms take at a given s.

Samples at the s of held-out frames are compared with these frames. Frame and samples of one s are
exchangeable if q(x|s) is right, which gives both figures a floor without any further reference:

- the Jensen-Shannon divergence between the histogram of the frames and that of the samples, both
  pooled over s; its floor is that of frames drawn from the samples themselves, one per s;
- the share of frames in bins that no sample *of the same s* visits; its floor is the mass that
  samples of this number miss (Good and Turing: the share of samples alone in their bin).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .bounds import normalised_weights
from .internals import wrapped

COVERAGE_BINS = 24
_FLOOR_DRAWS = 20
_FIXED_RAD = 1e-3  # samples that agree with their frame this well leave nothing to cover


def jensen_shannon(p: np.ndarray, q: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Return the Jensen-Shannon divergence of histograms, in nats: 0 (equal) to ln 2.

    Parameters
    ----------
    p, q
        Of one shape, sum 1 over ``axis``.
    axis
        Of the bins; None: all axes.
    """
    middle = 0.5 * (p + q)

    def relative(a: np.ndarray) -> np.ndarray:
        filled = a > 0
        ratio = np.where(filled, a, 1.0) / np.where(filled, middle, 1.0)
        return (a * np.log(ratio)).sum(axis)

    return np.maximum(0.0, 0.5 * relative(p) + 0.5 * relative(q))[()]


@dataclass(frozen=True, eq=False)
class TorsionCoverage:
    """How well samples cover n_torsions torsions that s leaves open; (n_torsions,) each.

    Attributes
    ----------
    names
        E.g. ``"N-CA-CB-CG (LEU 4)"``.
    divergence, divergence_floor
        Jensen-Shannon divergence of the pooled histograms, in nats, and its mean if all is right.
    uncovered, uncovered_floor
        Share of frames in bins that no sample of the same s visits, and what it is if all is right.
    n_states, n_samples
        States s, with one frame each, and samples per state.
    """

    names: tuple[str, ...]
    divergence: np.ndarray
    divergence_floor: np.ndarray
    uncovered: np.ndarray
    uncovered_floor: np.ndarray
    n_states: int
    n_samples: int

    def rows(self, most: int = 8) -> list[tuple[str, str, str]]:
        """Return a table of the worst torsions: name, divergence and uncovered share (floors)."""
        order = np.argsort(self.divergence_floor - self.divergence, kind="stable")[:most]
        return [
            (
                self.names[k],
                f"{self.divergence[k]:.4f} ({self.divergence_floor[k]:.4f})",
                f"{self.uncovered[k]:.1%} ({self.uncovered_floor[k]:.1%})",
            )
            for k in order
        ]

    def summary(self) -> dict[str, float]:
        """Return mean and worst figures, with their floors; zero if s fixes every torsion."""
        if not self.names:
            return {"torsions": 0.0}
        worst = int(np.argmax(self.divergence - self.divergence_floor))
        return {
            "torsions": float(len(self.names)),
            "torsion_js": float(self.divergence.mean()),
            "torsion_js_floor": float(self.divergence_floor.mean()),
            "torsion_js_worst": float(self.divergence[worst]),
            "torsion_js_worst_floor": float(self.divergence_floor[worst]),
            "torsion_uncovered": float(self.uncovered.mean()),
            "torsion_uncovered_floor": float(self.uncovered_floor.mean()),
        }


def torsion_coverage(
    names: Sequence[str],
    samples: np.ndarray,
    frames: np.ndarray,
    *,
    log_weight: np.ndarray | None = None,
    fold: np.ndarray | None = None,
    seed: int = 0,
) -> TorsionCoverage:
    """Compare torsions of samples with those of the frames that their s came from.

    Parameters
    ----------
    names
        Of the n torsions.
    samples
        Torsions of K samples of q(x|s) at each of S states, (S, K, n), rad, K >= 2.
    frames
        Torsions of the frame of each state, (S, n), rad.
    log_weight
        ln w of the samples, (S, K): the weighted samples are compared. Default: as drawn.
    fold
        Turns of 2π/fold that only swap like atoms, (n,), and are not told apart; default 1.
    seed
        Of the draws behind the floor of the divergence.

    Returns
    -------
    TorsionCoverage
        Without the torsions that s fixes: those of all samples equal that of their frame.
    """
    S, K, n = samples.shape
    if frames.shape != (S, n) or len(names) != n or K < 2:
        raise ValueError(
            f"need {len(names)} torsions of samples (S, K >= 2, n) and frames (S, n), got "
            f"{samples.shape} and {frames.shape}"
        )
    fold = np.ones(n, int) if fold is None else np.asarray(fold)
    is_open = (np.abs(wrapped(samples - frames[:, None])) > _FIXED_RAD).any((0, 1))
    drawn, known = _bins(samples, fold)[..., is_open], _bins(frames, fold)[..., is_open]
    weight = np.full((S, K), 1 / K) if log_weight is None else normalised_weights(log_weight)
    chosen = _drawn_rows(weight, np.random.default_rng(seed))
    figures = [_figures(drawn[..., k], known[:, k], weight, chosen) for k in range(drawn.shape[-1])]
    columns = np.array(figures, dtype=float).reshape(-1, 4).T
    kept = tuple(name for name, keep in zip(names, is_open, strict=True) if keep)
    return TorsionCoverage(kept, *columns, n_states=S, n_samples=K)


def _figures(
    drawn: np.ndarray, known: np.ndarray, weight: np.ndarray, chosen: np.ndarray
) -> tuple[float, float, float, float]:
    """Divergence, its floor, uncovered share, its floor: bins (S, K), (S,), draws (R, S)."""
    S, K = drawn.shape
    model = np.bincount(drawn.ravel(), weight.ravel(), COVERAGE_BINS) / weight.sum()
    data = np.bincount(known, minlength=COVERAGE_BINS) / S
    pseudo = drawn[np.arange(S), chosen] + COVERAGE_BINS * np.arange(len(chosen))[:, None]
    pseudo = np.bincount(pseudo.ravel(), minlength=COVERAGE_BINS * len(chosen))
    pseudo = pseudo.reshape(len(chosen), COVERAGE_BINS) / S
    floor = jensen_shannon(pseudo, np.broadcast_to(model, pseudo.shape), axis=1).mean()
    of_state = (drawn + COVERAGE_BINS * np.arange(S)[:, None]).ravel()
    visits = np.bincount(of_state, minlength=COVERAGE_BINS * S).reshape(S, COVERAGE_BINS)
    uncovered = np.mean(visits[np.arange(S), known] == 0)
    return jensen_shannon(data, model), floor, uncovered, (visits == 1).sum() / (S * K)


def _bins(angle: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Bins of angles (..., n) over a circle of 2π/fold."""
    turns = (angle * fold / (2 * np.pi)) % 1.0
    return np.minimum((turns * COVERAGE_BINS).astype(int), COVERAGE_BINS - 1)


def _drawn_rows(weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One sample of each state per draw, by weight, (_FLOOR_DRAWS, S)."""
    edges = weight.cumsum(1)
    at = rng.random((_FLOOR_DRAWS, len(weight), 1)) * edges[:, -1:]
    return np.minimum((edges <= at).sum(-1), weight.shape[1] - 1)

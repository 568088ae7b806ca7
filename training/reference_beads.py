"""Equilibrium frames of the beads, with weights where they aren't equal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ReferenceBeads:
    """Frames of the exact bead ensemble at one temperature.

    Parameters
    ----------
    beads
        Positions in Å, (N, n_beads, 3), in time order.
    log_weight
        Log-weights of the frames, (N,), as of biased dynamics or the ``log_bead_weights`` of
        `TwoLevelWeights`; default: equal weights.

    Raises
    ------
    ValueError
        If shapes are wrong, there are fewer than two frames, a value isn't finite, or all weights
        are zero.
    """

    beads: np.ndarray
    log_weight: np.ndarray | None = None

    def __post_init__(self) -> None:
        beads = np.asarray(self.beads, dtype=float)
        given = np.zeros(len(beads)) if self.log_weight is None else self.log_weight
        log_weight = np.asarray(given, dtype=float)
        if beads.ndim != 3 or beads.shape[-1] != 3 or len(beads) < 2:
            raise ValueError(f"beads must have shape (N >= 2, n_beads, 3), got {beads.shape}")
        if log_weight.shape != (len(beads),):
            raise ValueError(f"log_weight must have shape ({len(beads)},), got {log_weight.shape}")
        if not np.isfinite(beads).all():
            raise ValueError("beads hold NaN or infinity; drop failed frames")
        if not log_weight.max() < np.inf or np.isneginf(log_weight.max()):  # NaN is refused, too
            raise ValueError("log_weight must be below infinity, and one at least above minus that")
        object.__setattr__(self, "beads", beads)
        object.__setattr__(self, "log_weight", log_weight)

    def __len__(self) -> int:
        return len(self.beads)

    def split(self, share: float = 0.5) -> tuple[ReferenceBeads, ReferenceBeads]:
        """Return the first frames, and the last `share` of them to hold out.

        Not shuffled: neighbours in time are alike, and would be held out in name only.
        """
        cut = len(self) - round(share * len(self))
        return tuple(
            ReferenceBeads(self.beads[part], self.log_weight[part])
            for part in (slice(None, cut), slice(cut, None))
        )

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Return n frames, drawn with replacement by their weights, (n, n_beads, 3)."""
        edges = np.cumsum(np.exp(self.log_weight - self.log_weight.max()))
        return self.beads[np.searchsorted(edges, rng.random(n) * edges[-1], side="right")]

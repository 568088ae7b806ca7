"""Weighted sums over blocks of frames, and the error bars of what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

Finish = Callable[[np.ndarray], np.ndarray]


class BlockSums:
    """Σ w and Σ w v of every block, with values v of one fixed shape, as they come.

    Each block counts relative to its largest weight so far, so that nothing overflows and memory
    doesn't grow with the number of frames.

    Attributes
    ----------
    top
        Largest log weight of every block, (n_blocks,); -inf where there is none yet.
    weight
        Σ exp(log_w - top), (n_blocks,).
    value
        Σ exp(log_w - top) v, (n_blocks, ...), or None before the first value.
    """

    def __init__(self, n_blocks: int) -> None:
        self.top = np.full(n_blocks, -np.inf)
        self.weight = np.zeros(n_blocks)
        self.value: np.ndarray | None = None

    def add(self, block: int, log_w: float, value: np.ndarray) -> None:
        """Add a finite value (...) with a finite log weight to a block.

        Raises
        ------
        ValueError
            If the shape isn't that of earlier values.
        """
        if self.value is None:
            self.value = np.zeros((len(self.top), *value.shape))
        if value.shape != self.value.shape[1:]:
            raise ValueError(
                f"values must have one shape in all frames, got {self.value.shape[1:]} and "
                f"{value.shape}"
            )
        if log_w > self.top[block]:
            shrink = np.exp(self.top[block] - log_w)
            self.weight[block] *= shrink
            self.value[block] *= shrink
            self.top[block] = log_w
        w = np.exp(log_w - self.top[block])
        self.weight[block] += w
        self.value[block] += w * value

    @staticmethod
    def merged(parts: Sequence[BlockSums]) -> BlockSums:
        """Return the sums of several workers as one."""
        total = BlockSums(len(parts[0].top))
        total.top = np.max([part.top for part in parts], axis=0)
        for part in parts:
            if part.value is None:
                continue
            weight, value = part.relative_to(total.top)
            total.weight += weight
            total.value = value if total.value is None else total.value + value
        return total

    def relative_to(self, top: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Return weights (n_blocks,) and values (n_blocks, ...) relative to other log weights."""
        scale = np.exp(self.top - np.where(np.isfinite(top), top, 0.0))
        return scale * self.weight, scale.reshape(-1, *[1] * (self.value.ndim - 1)) * self.value


def jackknife_error(
    weight: np.ndarray, value: np.ndarray, size: np.ndarray, finish: Finish
) -> np.ndarray:
    """Return the standard error of ``finish(Σ value / Σ weight)`` without one block at a time.

    The delete-m_j jackknife, with m_j the number of bead frames of block j of B, n = Σ m_j and
    h_j = n/m_j. With θ_(j) the result without block j and pseudo-values h_j θ - (h_j - 1) θ_(j),
    error² = 1/B Σ_j (pseudo-value_j - their jackknife estimate)² / (h_j - 1). Blocks of one size
    give (B-1)/B Σ_j (θ_(j) - mean)², and with equal weights the textbook error of a mean. Weights
    are part of the data here, as in any ratio of means: they don't take the place of m_j.

    Parameters
    ----------
    weight, value
        Sums of every block, (n_blocks,) and (n_blocks, ...), on one scale.
    size
        m_j, (n_blocks,).
    finish
        Smooth function of the mean.

    References
    ----------
    Busing, Meijer, van der Leeden, Statistics and Computing 9, 3 (1999).
    """
    whole = finish(value.sum(0) / weight.sum())
    h = size.sum() / size
    change = np.array([finish(mean) - whole for mean in _without_one(weight, value)])
    h = h.reshape(-1, *[1] * (change.ndim - 1))
    spread = (h - 1) * change - np.sum((1 - 1 / h) * change, axis=0)
    return np.sqrt(np.mean(spread**2 / (h - 1), axis=0))


def _without_one(weight: np.ndarray, value: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the means (...) without each block, from sums of the others: nothing cancels."""
    later_weight = np.append(np.cumsum(weight[::-1])[::-1], 0.0)
    later_value = np.concatenate([np.cumsum(value[::-1], axis=0)[::-1], np.zeros_like(value[:1])])
    before_weight, before_value = 0.0, np.zeros_like(value[0])
    for j in range(len(weight)):
        yield (before_value + later_value[j + 1]) / (before_weight + later_weight[j + 1])
        before_weight, before_value = before_weight + weight[j], before_value + value[j]


def bootstrap_error(
    weight: np.ndarray, value: np.ndarray, finish: Finish, n: int, seed: int
) -> np.ndarray:
    """Return the standard error of ``finish(Σ value / Σ weight)`` from n draws of whole blocks.

    Their variance is multiplied by n_blocks / (n_blocks - 1), which makes the error of a mean with
    equal weights the textbook one. Draws in which no block has weight are repeated.

    Parameters
    ----------
    weight, value
        Sums of every block, (n_blocks,) and (n_blocks, ...), on one scale.
    finish
        Function of the mean.
    n, seed
        Number of draws, and seed of their generator.

    References
    ----------
    Efron, Tibshirani, An introduction to the bootstrap, ch. 8 (1993).
    """
    rng = np.random.default_rng(seed)
    n_blocks = len(weight)
    whole = finish(value.sum(0) / weight.sum())
    total, squares = np.zeros_like(whole), np.zeros_like(whole)
    for _ in range(n):
        times = np.zeros(n_blocks)
        while not times @ weight > 0:
            times = rng.multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks)).astype(float)
        change = finish(np.tensordot(times, value, axes=1) / (times @ weight)) - whole
        total, squares = total + change, squares + change**2
    return np.sqrt((squares - total**2 / n) / (n - 1) * n_blocks / (n_blocks - 1))

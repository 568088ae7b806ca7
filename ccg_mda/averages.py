"""Weighted averages, with error bars, of anything that can be worked out frame by frame."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import MDAnalysis as mda
import numpy as np
from MDAnalysis.analysis.base import AnalysisBase
from MDAnalysis.analysis.results import Results, ResultsGroup
from MDAnalysis.coordinates.base import ProtoReader

from ccg_mda.block_sums import BlockSums, Finish, bootstrap_error, jackknife_error
from ccg_mda.weights import (
    bead_frame,
    below_top,
    block_starts,
    effective_sample_size,
    flat_log_weights,
    frame_log_weight,
    pareto_k,
    warn_if_few,
)


class WeightedAverage(AnalysisBase):
    """Average any function of the atoms with the weights of the frames: Σ w v / Σ w, with errors.

    ::

        average = WeightedAverage(AtomGroup.radius_of_gyration, protein, log_w=log_w).run()
        average.results.mean, average.results.error

    Frames of weight zero aren't evaluated. Errors come from blocks of consecutive bead frames; all
    reconstructions of a bead frame are in one block. A block must outlast the correlation of the
    beads in time. Memory holds sums per block, however long the trajectory is. Of a file that
    carries ``cg_frame`` (H5MD) frames are read twice, first for that number.

    A `UserWarning` says so if the bead frames carry fewer than 50 effective samples (Kish), or if
    the Pareto k of their weights exceeds 0.7: a few of them would decide the average.

    Parameters
    ----------
    function
        Maps ``atoms`` at the current frame to an array of any fixed shape. It must be importable
        (no lambda) for other backends than serial.
    atoms
        AtomGroup, or Universe.
    log_w
        Log weights of *all* frames of the trajectory, shape (n_frames,), as `log_weights` gives.
        Without it, ``ts.data["log_weight"]`` is used as frames are read: weights of atoms given
        their beads. If the beads were sampled from exp(-F/kT), pass
        ``log_weights(u, free_energy=..., temperature_K=...)`` to average over the whole ensemble.
    finish
        Turns the mean value into the quantity wanted, as ``np.sqrt`` does for a mean square. Errors
        are those of its result; where that isn't finite, they are NaN.
    n_blocks
        At most so many blocks; as many as there are bead frames if those are fewer.
    error
        ``"jackknife"``: leave out one block at a time; needs a smooth ``finish``. ``"bootstrap"``:
        draw blocks with replacement.
    n_bootstrap, seed
        Number of draws and seed of the bootstrap.
    **kwargs
        ``verbose``, see `AnalysisBase`.

    Attributes
    ----------
    results.mean, results.error
        Average and its standard error, in the shape that ``finish`` returns.
    results.log_weights
        Log weights of the frames of the run, shape (n_frames,).
    results.effective_sample_size, results.pareto_k
        Of these frames; the first as a fraction.
    results.n_blocks
        Number of blocks.
    """

    _analysis_algorithm_is_parallelizable = True

    @classmethod
    def get_supported_backends(cls) -> tuple[str, ...]:
        """Return the names of the backends that `run` takes."""
        return ("serial", "multiprocessing", "dask")

    def __init__(
        self,
        function: Callable[[mda.AtomGroup], np.ndarray],
        atoms: mda.AtomGroup | mda.Universe,
        *,
        log_w: np.ndarray | None = None,
        finish: Finish | None = None,
        n_blocks: int = 20,
        error: Literal["jackknife", "bootstrap"] = "jackknife",
        n_bootstrap: int = 1000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(atoms.universe.trajectory, **kwargs)
        if error not in ("jackknife", "bootstrap"):
            raise ValueError(f"error must be 'jackknife' or 'bootstrap', got {error!r}")
        if n_blocks < 2:
            raise ValueError(f"n_blocks must be at least 2, got {n_blocks}")
        if n_bootstrap < 2:
            raise ValueError(f"n_bootstrap must be at least 2, got {n_bootstrap}")
        if log_w is not None:
            log_w = flat_log_weights(log_w)
            below_top(log_w, 0)  # refuses NaN
            if len(log_w) != len(self._trajectory):
                raise ValueError(
                    f"{len(log_w)} log weights given for a trajectory of {len(self._trajectory)} "
                    "frames; give those of all frames, and choose frames in run()"
                )
        self.function = function
        self.atoms = atoms.atoms if isinstance(atoms, mda.Universe) else atoms
        self.log_w = log_w
        self.finish = finish
        self.n_blocks = n_blocks
        self.error = error
        self.n_bootstrap = n_bootstrap
        self.seed = seed

    def run(
        self,
        start: int | None = None,
        stop: int | None = None,
        step: int | None = None,
        frames: Sequence[int] | Sequence[bool] | None = None,
        **kwargs: Any,
    ) -> WeightedAverage:
        """Read the frames; see `AnalysisBase.run` for what it takes.

        Raises
        ------
        ValueError
            If the frames belong to fewer than 2 bead frames, no frame has weight, or a frame that
            has weight has a value that isn't finite.
        NoDataError
            If a frame carries no log weight and none were given.
        """
        slicer = self._define_run_frames(self._trajectory, start, stop, step, frames)
        if not isinstance(slicer, slice):
            slicer = np.asarray(slicer)
            slicer = slicer if slicer.dtype == bool else slicer.astype(int)  # [] has dtype float
        self._set_blocks(np.arange(len(self._trajectory))[slicer])
        super().run(start=start, stop=stop, step=step, frames=frames, **kwargs)
        per_bead_frame = np.full(self._block_size.sum(), -np.inf)
        np.logaddexp.at(per_bead_frame, self._bead[self.frames], self.results.log_weights)
        warn_if_few(per_bead_frame, "bead frames")
        return self

    def _set_blocks(self, frames: np.ndarray) -> None:
        """Tell the block of every frame before workers share them out."""
        beads, index = np.unique(_bead_frames(self._trajectory, frames), return_inverse=True)
        if len(beads) < 2:
            raise ValueError(
                f"an error bar needs frames of at least 2 bead frames, the run has {len(beads)}"
            )
        starts = block_starts(len(beads), min(self.n_blocks, len(beads)))
        self._block_size = np.diff(np.append(starts, len(beads)))
        self._bead = np.full(len(self._trajectory), -1)
        self._bead[frames] = index
        self._block = np.repeat(np.arange(len(starts)), self._block_size)

    def _prepare(self) -> None:
        self.results = Results(
            block_sums=BlockSums(len(self._block_size)), log_weights=np.empty(self.n_frames)
        )

    def _single_frame(self) -> None:
        frame = self._ts.frame
        log_w = frame_log_weight(self._ts) if self.log_w is None else self.log_w[frame]
        if np.isnan(log_w) or np.isposinf(log_w):
            raise ValueError(f"the log weight of frame {frame} is {log_w}")
        self.results.log_weights[self._frame_index] = log_w
        if np.isneginf(log_w):
            return
        value = np.asarray(self.function(self.atoms), dtype=float)
        if not np.isfinite(value).all():
            raise ValueError(
                f"the value of frame {frame}, which has weight, is NaN or infinite; leave the "
                "frame out, or give it the log weight -inf"
            )
        self.results.block_sums.add(self._block[self._bead[frame]], log_w, value)

    def _get_aggregator(self) -> ResultsGroup:
        return ResultsGroup(
            {"block_sums": BlockSums.merged, "log_weights": ResultsGroup.ndarray_hstack}
        )

    def _conclude(self) -> None:
        sums: BlockSums = self.results.pop("block_sums")
        log_w = self.results.log_weights
        if sums.value is None:
            raise ValueError("can't average: all weights are zero")
        weight, value = sums.relative_to(sums.top.max())
        self.results.mean = self._finished(value.sum(0) / weight.sum())
        self.results.error = self._error(weight, value)
        self.results.effective_sample_size = effective_sample_size(log_w)
        self.results.pareto_k = pareto_k(log_w)
        self.results.n_blocks = len(weight)

    def _finished(self, mean: np.ndarray) -> np.ndarray:
        return mean if self.finish is None else np.asarray(self.finish(mean))[()]

    def _error(self, weight: np.ndarray, value: np.ndarray) -> np.ndarray:
        if np.count_nonzero(weight) < 2:
            warnings.warn(
                "all weight lies in one block of bead frames, so that there is no error bar; run "
                "longer, or train a model whose weights are more even",
                stacklevel=5,
            )
            return np.full(np.shape(self.results.mean), np.nan)[()]
        with np.errstate(divide="ignore", invalid="ignore"):  # what isn't finite has the error NaN
            if self.error == "jackknife":
                return jackknife_error(weight, value, self._block_size, self._finished)
            return bootstrap_error(weight, value, self._finished, self.n_bootstrap, self.seed)


def _bead_frames(trajectory: ProtoReader, frames: np.ndarray) -> np.ndarray:
    """Return the bead frame of every frame (n,), without placing atoms if a `BeadReader` knows."""
    if hasattr(trajectory, "n_samples"):
        return frames // trajectory.n_samples
    if "cg_frame" not in trajectory.ts.data:
        return frames
    distinct, index = np.unique(frames, return_inverse=True)
    return np.array([bead_frame(ts) for ts in trajectory[distinct]], dtype=int)[index]

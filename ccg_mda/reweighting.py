"""Analyses of MDAnalysis with weights: their own measure of a frame, averaged with error bars."""

from __future__ import annotations

import copy
import warnings
from functools import singledispatch
from typing import Any, Literal

import MDAnalysis as mda
import numpy as np
from MDAnalysis.analysis.base import AnalysisBase
from MDAnalysis.analysis.dihedrals import Dihedral, Ramachandran
from MDAnalysis.analysis.hydrogenbonds import HydrogenBondAnalysis
from MDAnalysis.analysis.rdf import InterRDF
from MDAnalysis.analysis.results import Results
from MDAnalysis.analysis.rms import RMSD, RMSF

from ccg_mda.averages import WeightedAverage

_MOST_BONDS = 1_000_000  # possible hydrogen bonds: 8 MB per block


def reweight(
    analysis: AnalysisBase,
    log_w: np.ndarray | None = None,
    *,
    bins: int | None = None,
    n_blocks: int = 20,
    error: Literal["jackknife", "bootstrap"] = "jackknife",
    n_bootstrap: int = 1000,
    seed: int = 0,
    **run: Any,
) -> WeightedAverage:
    """Run an analysis with weights; all its options are honoured, and it needn't have been run.

    ================================ ===============================================================
    ``RMSD``                         mean RMSD, (1 + n_groupselections,), Å
    ``RMSF``                         RMSF of every atom, (n_atoms,), Å; `atom_indices`
    ``InterRDF``                     in its own norm, (n_bins,); `bins` and `edges` in Å
    ``Dihedral``                     density of every dihedral, (n_dihedrals, n_bins), per degree;
                                     `bins` and `edges` in degrees, `atom_indices` (n_dihedrals, 4)
    ``Ramachandran``, ``Janin``      density of (φ, ψ) of all residues together, (n_bins, n_bins),
                                     per degree²; `bins` and `edges`, `resids`
    ``HydrogenBondAnalysis``         mean number per frame; `hbonds` (n_bonds, 3): atom indices of
                                     donor, hydrogen, acceptor of all bonds seen, with `occupancy`
                                     and `occupancy_error` (n_bonds,)
    ================================ ===============================================================

    That is ``results.mean``, and the names are further fields of ``results``.

    Parameters
    ----------
    analysis
        One of the above; it stays as it is. Possible hydrogen bonds, hydrogens times acceptors, may
        be a million at most; their atoms and donors must be the same in all frames.
    log_w
        Log weights of all frames of the trajectory; see `WeightedAverage`.
    bins
        Number of bins of a full turn, for dihedrals; default 36.
    n_blocks, error, n_bootstrap, seed
        See `WeightedAverage`.
    **run
        Passed to `WeightedAverage.run`: ``start``, ``stop``, ``step``, ``frames``, ``backend``,
        ``n_workers``, ...

    Returns
    -------
    WeightedAverage
        Already run.

    Raises
    ------
    TypeError
        For any other analysis.
    ValueError
        See `WeightedAverage`; also if there are too many possible hydrogen bonds, or their atoms
        change.

    Example
    -------
    ::

        rdf = reweight(InterRDF(oxygens, oxygens), log_w, backend="multiprocessing", n_workers=2)
        plt.errorbar(rdf.results.bins, rdf.results.mean, rdf.results.error)
    """
    options = {"n_blocks": n_blocks, "error": error, "n_bootstrap": n_bootstrap, "seed": seed}
    return _Reweighted(_measure(analysis, bins), log_w=log_w, **options).run(**run)


class _Reweighted(WeightedAverage):
    """The weighted average of a `_Measure`, which also knows what to call its results."""

    def __init__(self, measure: _Measure, **options: Any) -> None:
        super().__init__(measure, measure.atoms, finish=measure.finish, **options)

    def _conclude(self) -> None:
        super()._conclude()
        self.function.describe(self.results)


class _Measure:
    """An analysis that is driven frame by frame, as if each were a trajectory of its own."""

    def __init__(self, analysis: AnalysisBase, bins: int | None) -> None:
        if bins is not None and not isinstance(self, _Angles):
            raise TypeError(
                f"bins goes with dihedrals; {type(analysis).__name__} has its own options"
            )
        self.analysis = copy.copy(analysis)
        self.analysis.results = Results()
        self.analysis._trajectory = self.atoms.universe.trajectory
        self.analysis.n_frames, self.analysis._frame_index = 1, 0
        self.analysis._prepare()

    @property
    def atoms(self) -> mda.AtomGroup | mda.Universe:
        """What the analysis looks at."""
        return self.analysis.atomgroup

    def __call__(self, atoms: mda.AtomGroup) -> np.ndarray:
        """Return what the current frame adds to the average."""
        raise NotImplementedError

    def finish(self, mean: np.ndarray) -> np.ndarray:
        """Return the result of the analysis from mean values."""
        return mean

    def describe(self, results: Results) -> None:
        """Name the axes of the result."""

    def _single_frame(self, atoms: mda.AtomGroup) -> Results:
        self.analysis._ts = atoms.universe.trajectory.ts
        self.analysis._single_frame()
        return self.analysis.results


@singledispatch
def _measure(analysis: Any, bins: int | None) -> _Measure:
    raise TypeError(
        f"reweight can't weigh {type(analysis).__name__}; average a function of your own with "
        "WeightedAverage, or use analysis.run(frames=resample(log_w, n))"
    )


@_measure.register(RMSD)
class _RMSD(_Measure):
    # Its preparation reads the reference frame: once is enough.
    def __call__(self, atoms: mda.AtomGroup) -> np.ndarray:
        return self._single_frame(atoms).rmsd[0, 2:].copy()


@_measure.register(RMSF)
class _RMSF(_Measure):
    """From mean and mean square of the displacement from some frame."""

    def __init__(self, analysis: RMSF, bins: int | None) -> None:
        super().__init__(analysis, bins)
        # Near the atoms, so that squares keep their digits; the result doesn't depend on it.
        self.origin = np.nan_to_num(self.atoms.positions.astype(float), posinf=0.0, neginf=0.0)

    def __call__(self, atoms: mda.AtomGroup) -> np.ndarray:
        moved = atoms.positions - self.origin
        return np.column_stack([moved, np.sum(moved**2, axis=1)])

    def finish(self, mean: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(mean[:, 3] - np.sum(mean[:, :3] ** 2, axis=1), 0.0))

    def describe(self, results: Results) -> None:
        results.atom_indices = self.analysis.atomgroup.indices


@_measure.register(InterRDF)
class _InterRDF(_Measure):
    """Mean counts and mean volume; the norm is the analysis's own."""

    @property
    def atoms(self) -> mda.AtomGroup:
        return self.analysis.g1

    def __call__(self, atoms: mda.AtomGroup) -> np.ndarray:
        self.analysis._prepare()
        found = self._single_frame(atoms)
        return np.append(found.count, found.get("volume_cum", []))

    def finish(self, mean: np.ndarray) -> np.ndarray:
        own = self.analysis.results
        own.count, own.volume_cum = np.split(mean, [len(own.bins)])
        self.analysis._conclude()
        return own.rdf

    def describe(self, results: Results) -> None:
        results.bins, results.edges = self.analysis.results.bins, self.analysis.results.edges


class _Angles(_Measure):
    """Bins of a full turn, from -180 to 180 degrees."""

    def __init__(self, analysis: Dihedral | Ramachandran, bins: int | None) -> None:
        super().__init__(analysis, bins)
        self.n_bins = 36 if bins is None else bins
        if self.n_bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")

    @property
    def atoms(self) -> mda.AtomGroup:
        return self.analysis.ag1

    def _bin_numbers(self, atoms: mda.AtomGroup) -> np.ndarray:
        """Return the bins of the angles of the current frame, (n_dihedrals,) or (n_residues, 2)."""
        self.analysis._prepare()
        self._single_frame(atoms)
        self.analysis._conclude()  # turns radians into degrees
        angles = self.analysis.results.angles[0]
        if np.isnan(angles).any():
            raise ValueError(
                f"a dihedral of frame {atoms.universe.trajectory.frame}, which has weight, is NaN; "
                "leave the frame out, or give it the log weight -inf"
            )
        return np.floor((angles + 180.0) * (self.n_bins / 360.0)).astype(int) % self.n_bins

    def describe(self, results: Results) -> None:
        results.edges = np.linspace(-180.0, 180.0, self.n_bins + 1)
        results.bins = 0.5 * (results.edges[:-1] + results.edges[1:])


@_measure.register(Dihedral)
class _DihedralDensity(_Angles):
    def __call__(self, atoms: mda.AtomGroup) -> np.ndarray:
        numbers = self._bin_numbers(atoms)
        density = np.zeros((len(numbers), self.n_bins))
        density[np.arange(len(numbers)), numbers] = self.n_bins / 360.0
        return density

    def describe(self, results: Results) -> None:
        super().describe(results)
        own = self.analysis
        groups = own.ag1, own.ag2, own.ag3, own.ag4
        results.atom_indices = np.column_stack([group.indices for group in groups])


@_measure.register(Ramachandran)
class _RamachandranDensity(_Angles):
    def __call__(self, atoms: mda.AtomGroup) -> np.ndarray:
        numbers = self._bin_numbers(atoms)
        count = np.bincount(numbers @ [self.n_bins, 1], minlength=self.n_bins**2)
        return count.reshape(self.n_bins, -1) * (self.n_bins / 360.0) ** 2 / len(numbers)

    def describe(self, results: Results) -> None:
        super().describe(results)
        results.resids = self.analysis.ag2.resids


@_measure.register(HydrogenBondAnalysis)
class _HydrogenBonds(_Measure):
    """Number of bonds, and then which are there: pairs of donor and hydrogen times acceptors."""

    def __init__(self, analysis: HydrogenBondAnalysis, bins: int | None) -> None:
        super().__init__(analysis, bins)
        own = self.analysis
        self.pairs = np.column_stack([own._donors.indices, own._hydrogens.indices])
        self.acceptors = own._acceptors.indices
        self.n_bonds = len(self.pairs) * len(self.acceptors)
        if self.n_bonds > _MOST_BONDS:
            raise ValueError(
                f"{len(self.pairs)} hydrogens and {len(self.acceptors)} acceptors could form more "
                f"than {_MOST_BONDS} bonds; narrow hydrogens_sel and acceptors_sel, or average a "
                "number of bonds with WeightedAverage"
            )
        self._row = {tuple(pair): row for row, pair in enumerate(self.pairs.tolist())}
        self._column = {atom: column for column, atom in enumerate(self.acceptors.tolist())}

    @property
    def atoms(self) -> mda.Universe:
        return self.analysis.u

    def __call__(self, atoms: mda.AtomGroup) -> np.ndarray:
        self.analysis._prepare()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No hydrogen bonds were found")
            bonds = np.array(self._single_frame(atoms).hbonds[1:4], dtype=int).T.tolist()
        value = np.zeros(1 + self.n_bonds)
        value[0] = len(bonds)
        for donor, hydrogen, acceptor in bonds:
            try:
                row, column = self._row[donor, hydrogen], self._column[acceptor]
            except KeyError:
                raise ValueError(
                    f"the bond of atoms {donor}, {hydrogen} and {acceptor} in frame "
                    f"{atoms.universe.trajectory.frame} was impossible in the frame at which "
                    "reweight was called; select atoms by what doesn't change, and have bonds in "
                    "the topology"
                ) from None
            value[1 + row * len(self.acceptors) + column] = 1.0
        return value

    def describe(self, results: Results) -> None:
        number, occupancy = results.mean[0], results.mean[1:]
        seen = np.flatnonzero(occupancy)
        row, column = np.divmod(seen, len(self.acceptors))
        results.hbonds = np.column_stack([self.pairs[row], self.acceptors[column]])
        results.occupancy, results.occupancy_error = occupancy[seen], results.error[1:][seen]
        results.mean, results.error = number, results.error[0]

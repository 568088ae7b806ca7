"""Bead ensembles over a whole grid by umbrella windows, as a proposal for atoms.

Windows are replicas of one batch of bead dynamics, each with a centre of its own, so that barriers
cost no energy calls. MBAR turns them into samples of the ensemble exp(-F_φ/kT) of the bead force
field, barriers included. With P_φ of a bin from all of these, and W = Ẑ(s) exp(F_φ(s)/kT) from
reconstructions of a few of them, P(bin) is P_φ(bin) E_φ[W | bin], right for any force field; the
nearer it is to the truth, the less W varies, and the fewer energy calls are needed (control
variate; two-level weights E6 of the project's theory).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array, csr_array, vstack

from ccg_ase.evaluator import Evaluator
from ccg_ase.langevin import BatchedLangevin
from ccg_ase.units import thermal_energy
from ccg_mda.internals import wrapped
from ccg_mda.weights import effective_sample_size, resample

from .free_energy_direct import Drawn
from .free_energy_grid import Grid, Variable
from .free_energy_sampling import Tick
from .mbar import Mbar, solve_mbar
from .reference import read_npz, write_npz

_PULLS = 12  # steps in which windows are pulled from the start to their centres
_CHUNKS = 10  # files of a run, and blocks of the error bars
_MOST_WINDOWS = 600  # by default
_MOST_FRAMES = 200_000  # of all windows together
_FARTHEST = 40.0  # bias in kT above that of the nearest window beyond which one counts for nothing
_BOOTSTRAPS = 100


@dataclass(frozen=True)
class WindowSettings:
    """Umbrella windows and their dynamics.

    Attributes
    ----------
    per_variable
        Windows along each variable.
    stiffness_kT
        k of the harmonic bias, in kT over the squared distance of neighbouring centres.
    n_steps
        Steps per window, a tenth more to relax not counted.
    timestep_fs, friction_per_ps
        Of the bead dynamics.
    seed
        Of its noise.
    """

    per_variable: int
    stiffness_kT: float = 4.0
    n_steps: int = 10_000
    timestep_fs: float = 4.0
    friction_per_ps: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_variable < 2 or self.n_steps < 10 * _CHUNKS:
            raise ValueError(
                f"umbrella sampling needs two windows per variable and {10 * _CHUNKS} steps, got "
                f"{self.per_variable} and {self.n_steps}"
            )


class BeadEnsemble(NamedTuple):
    """Frames of all windows.

    Attributes
    ----------
    beads
        (N, n_beads, 3), Å.
    free_energy
        F_φ of each frame, (N,), eV.
    window, block
        Which window, and which block of it counted over all windows, (N,).
    """

    beads: np.ndarray
    free_energy: np.ndarray
    window: np.ndarray
    block: np.ndarray


def window_centres(grid: Grid, per_variable: int) -> np.ndarray:
    """Return the centres of all windows, (R, d): evenly over the range, once round a circle."""
    axes = []
    for variable, edges in zip(grid.variables, grid.edges, strict=True):
        turn = variable.periodic and np.isclose(edges[-1] - edges[0], 2 * np.pi)
        axes.append(np.linspace(edges[0], edges[-1], per_variable, endpoint=not turn))
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def usual_windows(n_variables: int) -> int:
    """Return windows per variable: 24, 15° round a circle, or what many variables leave room for.

    On barriers F over backbone torsions curves down by 60 kT/rad² and more (alanine dipeptide).
    Windows much softer than that, 15 kT/rad² at 30°, see both sides and don't cross; 58 at 15° do.
    """
    return min(24, int(_MOST_WINDOWS ** (1 / n_variables)))


def n_windows(grid: Grid, settings: WindowSettings) -> int:
    """Return the number of windows, R."""
    return settings.per_variable ** len(grid.variables)


def _spacing(grid: Grid, settings: WindowSettings) -> np.ndarray:
    """Distance of neighbouring windows along each variable, (d,), Å or rad."""
    centres = window_centres(grid, settings.per_variable)
    return np.array([np.diff(np.unique(column))[0] for column in centres.T])


def run_windows(
    evaluator: Evaluator,
    start: np.ndarray,
    grid: Grid,
    folder: Path,
    settings: WindowSettings,
    *,
    tick: Tick | None = None,
) -> BeadEnsemble:
    """Run all windows side by side, in chunks that are kept; no energy call is spent.

    Parameters
    ----------
    evaluator
        Of the bead force field, for `n_windows` replicas; the temperature is the force field's.
    start
        A bead structure, (n_beads, 3), Å, from which all windows are pulled to their centres.
    grid
        Over variables of beads.
    folder
        Keeps the chunks; call again with the same arguments to continue to the same frames.
    settings
        Windows and dynamics.
    tick
        Called with steps done, steps in all, and a note.
    """
    temperature_K = evaluator.force_field.temperature_K
    centres = window_centres(grid, settings.per_variable)
    stiffness_kT = settings.stiffness_kT / _spacing(grid, settings) ** 2
    stiffness = stiffness_kT * thermal_energy(temperature_K)
    n_windows = len(centres)
    frames = int(np.clip(_MOST_FRAMES // n_windows, 5 * _CHUNKS, 200 * _CHUNKS))
    every = -(-settings.n_steps // frames)
    n_chunk = max(every, settings.n_steps // _CHUNKS // every * every)
    n_relax = max(1, settings.n_steps // 10)
    total = n_relax + _CHUNKS * n_chunk

    def sampler_at(middles: np.ndarray, seed: int) -> BatchedLangevin:
        return BatchedLangevin(
            evaluator,
            timestep_fs=settings.timestep_fs,
            friction_per_ps=settings.friction_per_ps,
            seed=np.random.SeedSequence([settings.seed, seed])
            .generate_state(n_windows, np.uint64)
            .tolist(),
            restraints=[
                variable.restraint(middles[:, k], stiffness[k])
                for k, variable in enumerate(grid.variables)
            ],
        )

    chunks = [folder / f"windows_{number:02d}.npz" for number in range(_CHUNKS)]
    done = 0
    while done < _CHUNKS and chunks[done].exists():
        done += 1
    if done < _CHUNKS:
        folder.mkdir(parents=True, exist_ok=True)
        sampler = sampler_at(centres, _PULLS)
        if done:
            sampler.load_restart(folder / f"windows_{done - 1:02d}.restart")
        else:
            beads = _pulled(sampler_at, start, grid, centres, n_relax)
            sampler.run(beads, n_relax, every=n_relax)
        for number in range(done, _CHUNKS):
            run = sampler.run(None, n_chunk, every=every)
            # First the state, then the frames: whoever finds the frames can go on from them.
            sampler.save_restart(folder / f"windows_{number:02d}.restart")
            write_npz(chunks[number], {"beads": run.beads, "free_energy": run.energies})
            if tick is not None:
                tick(n_relax + (number + 1) * n_chunk, total, f"{n_windows} windows")
    parts = [read_npz(path) for path in chunks]
    shape = parts[0]["free_energy"].shape
    window = np.broadcast_to(np.arange(n_windows), (_CHUNKS, *shape))
    number = np.arange(_CHUNKS)[:, None, None]
    return BeadEnsemble(
        np.concatenate([part["beads"] for part in parts]).reshape(-1, *start.shape),
        np.concatenate([part["free_energy"] for part in parts]).ravel().astype(float),
        window.ravel(),
        (window * _CHUNKS + number).ravel(),
    )


def _pulled(sampler_at, start: np.ndarray, grid: Grid, centres: np.ndarray, n_steps: int):
    """Move windows from one structure to their centres, the short way round a circle."""
    beads = np.repeat(start[None], len(centres), axis=0)
    first = np.stack([variable.values(start) for variable in grid.variables])
    way = centres - first
    way = np.stack([_away(v, way[:, k]) for k, v in enumerate(grid.variables)], -1)
    n_each = max(1, n_steps // 4)
    for pull in range(_PULLS):
        run = sampler_at(first + way * (pull + 1) / _PULLS, pull).run(beads, n_each, every=n_each)
        beads = run.beads[-1]
    return beads


class FromEnsemble:
    """States of a bin drawn from the bead ensemble exp(-F_φ/kT), with P_φ of the bin.

    Parameters
    ----------
    grid
        Over variables of beads.
    ensemble
        From `run_windows`.
    settings
        Of the windows.
    temperature_K
        Of the force field.
    min_effective
        A bin with fewer effective bead frames is unknown to the ensemble.

    Attributes
    ----------
    log_share, log_share_replicas
        ln P_φ of every bin, (n_points,), and replicas, (n_replicas, n_points): blocks of frames
        are drawn anew within each window, to first order in the change, and windows that
        contradict one another are weighted anew as a whole.
    centres
        Of the windows, (n_windows, d).
    inconsistency
        See `Mbar`.
    disagreement
        Work from a window to the next one by its own mean force, less what all windows together
        make of it, (n_windows, d), in kT.
    known
        Bins that states can be drawn in, (n_points,).
    effective
        Effective number of bead frames per bin, (n_points,).
    """

    def __init__(
        self,
        grid: Grid,
        ensemble: BeadEnsemble,
        settings: WindowSettings,
        temperature_K: float,
        *,
        min_effective: float = 10.0,
    ) -> None:
        self.grid, self.ensemble = grid, ensemble
        kT = thermal_energy(temperature_K)
        values = np.stack([variable.values(ensemble.beads) for variable in grid.variables], -1)
        factor = _bias_factor(grid, values, settings)
        solved = solve_mbar(factor, ensemble.window, ensemble.block)
        point = grid.index(values)
        order = np.argsort(point, kind="stable")
        self._frames = order[np.searchsorted(point[order], 0) :]
        first = np.searchsorted(point[self._frames], np.arange(1, grid.n_points))
        self._in_bin = np.split(self._frames, first)
        self._log_c = solved.log_weight
        self.effective = np.array(
            [
                effective_sample_size(self._log_c[own]) * len(own) if len(own) else 0.0
                for own in self._in_bin
            ]
        )
        self.known = self.effective >= min_effective
        with np.errstate(divide="ignore"):
            weight = np.exp(self._log_c[self._frames])
            self.log_share = np.log(np.bincount(point[self._frames], weight, grid.n_points))
        self.centres = window_centres(grid, settings.per_variable)
        self.inconsistency = solved.inconsistency
        self.disagreement = _disagreement(grid, values, settings, ensemble.window, solved.share)
        self.log_share_replicas = self._replicas(solved, point[self._frames])
        # A zero near the typical F_φ keeps the numbers small; it cancels in P.
        typical = np.median(ensemble.free_energy)
        self._log_offset = (ensemble.free_energy - typical) / kT

    def draw(
        self, points: np.ndarray, first: int, n_samples: int, rng: np.random.Generator
    ) -> Drawn:
        """Draw states of bins (n,) in proportion to their weights, K each; see `Proposal`."""
        chosen = np.empty((len(points), n_samples), dtype=int)
        for row, point in enumerate(points):
            own = self._in_bin[point]
            chosen[row] = own[resample(self._log_c[own], n_samples, rng)]
        return Drawn(
            self.ensemble.beads[chosen].astype(float),
            self._log_offset[chosen],
            self.ensemble.block[chosen],
        )

    def _replicas(self, solved: Mbar, point: np.ndarray) -> np.ndarray:
        """Replicas of ln P_φ, (n_replicas, n_points)."""
        rng = np.random.default_rng(0)
        n_windows = solved.influence.shape[1]
        log_c, block, share = (
            array[self._frames] for array in (self._log_c, self.ensemble.block, solved.share)
        )
        # One block fewer is drawn: unbiased for few blocks (Rao, Wu, J. Am. Stat. Assoc. 83, 231).
        drawn = rng.multinomial(
            _CHUNKS - 1, np.full(_CHUNKS, 1 / _CHUNKS), size=(_BOOTSTRAPS, n_windows)
        ).reshape(_BOOTSTRAPS, -1)
        drawn = drawn * _CHUNKS / (_CHUNKS - 1)
        moved = share @ ((drawn - 1) @ solved.influence).T
        log_p = np.empty((_BOOTSTRAPS, self.grid.n_points))
        for replica in range(_BOOTSTRAPS):
            weight = drawn[replica, block] * np.exp(log_c - moved[:, replica])
            total = np.bincount(point, weight, self.grid.n_points)
            log_p[replica] = np.log(np.maximum(total, np.finfo(float).tiny))
        # Blocks of a window that sticks on one side of a barrier agree: only its neighbours tell.
        # As in a random-effects model, what blocks explain isn't counted twice.
        excess = np.sqrt(1 - 1 / max(solved.inconsistency, 1.0))
        window, shape = block // _CHUNKS, (self.grid.n_points, n_windows)
        probability, frame = np.exp(log_c), np.arange(len(point))
        own = coo_array((probability, (point, window)), shape).toarray()
        in_bin = coo_array((probability, (point, frame)), (shape[0], len(frame)))
        shared = (in_bin @ share).toarray()
        change = own - shared - shared @ solved.ensemble_influence.T
        relative = change / np.maximum(own.sum(1, keepdims=True), np.finfo(float).tiny)
        log_p += excess * rng.standard_normal((_BOOTSTRAPS, n_windows)) @ relative.T
        return np.where(np.isfinite(self.log_share), log_p, -np.inf)


def _disagreement(
    grid: Grid,
    values: np.ndarray,
    settings: WindowSettings,
    window: np.ndarray,
    share: csr_array,
) -> np.ndarray:
    """Mean of each window by its own frames less that by all, as work to the next one, in kT."""
    centres, of_all = window_centres(grid, settings.per_variable), share.tocoo()
    found = []
    for k, variable in enumerate(grid.variables):
        own = _away(variable, values[:, k] - centres[window, k])
        far = _away(variable, values[of_all.row, k] - centres[of_all.col, k])
        gap = np.bincount(window, own) / np.bincount(window)
        gap -= np.bincount(of_all.col, of_all.data * far) / share.sum(0)
        found.append(gap)
    return np.stack(found, -1) * settings.stiffness_kT / _spacing(grid, settings)


def _bias_factor(grid: Grid, values: np.ndarray, settings: WindowSettings) -> csr_array:
    """Exp(-bias/kT) of the windows near values (N, d), (N, R)."""
    centres = window_centres(grid, settings.per_variable)
    stiffness = settings.stiffness_kT / _spacing(grid, settings) ** 2
    parts = []
    for piece in np.array_split(values, len(values) // 10_000 + 1):  # dense, all of it is huge
        bias = np.zeros((len(piece), len(centres)))
        for k, variable in enumerate(grid.variables):
            away = _away(variable, piece[:, k, None] - centres[:, k])
            bias += 0.5 * stiffness[k] * away**2
        near = bias <= bias.min(1, keepdims=True) + _FARTHEST
        parts.append(csr_array(np.where(near, np.exp(-bias), 0.0)))
    return vstack(parts, format="csr")


def _away(variable: Variable, difference: np.ndarray) -> np.ndarray:
    """Return differences the short way round a circle."""
    return wrapped(difference) if variable.periodic else difference

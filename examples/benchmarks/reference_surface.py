"""The reference F(φ, ψ) of alanine dipeptide: stages of flattened dynamics, what they give, checks.

Weights exp(V/kT) take the bias off. Errors are bootstrap over whole walkers, each of which roams
the plane. Stages are stored one by one: an interrupted run continues when it is started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import flattened
import numpy as np
import simulate
import surface
import torch
from flattened import PeriodicBias, Run, Walkers
from measures import PHI_PSI

from ccg_ase.torsion_map import dihedral_angles
from ccg_mda.block_sums import bootstrap_error
from ccg_training.metrics import free_energy, torsion_centres, torsion_histogram
from ccg_training.reference import ReferenceData, read_npz, read_structure, write_npz

GRIDS = (24, 36)
FINE = 72  # bins that are summed to those of the grids
DRAWS = 200
BIAS_BINS = 36
METHYLS = ((0, 2, 3), (11, 12, 13), (19, 20, 21))  # hydrogens


@dataclass(frozen=True)
class Stage:
    """A run of all walkers that is stored as one file, and follows the one before."""

    name: str
    steps: int
    deposit_kT: float = 0.0


def stages(chunks: int) -> list[Stage]:
    """Return the stages: a bias is grown, refined twice, and then kept for the stored frames."""
    return [
        Stage("adaptive", 8000, deposit_kT=0.1),
        Stage("refine_1", 5000),
        Stage("refine_2", 5000),
        Stage("relax", 2500),
        *(Stage(f"static_{k:03d}", 5000) for k in range(chunks)),
    ]


def sample(folder: Path, chunks: int, walkers: int, seed: int) -> None:
    """Run the stages that `folder` doesn't hold: each a pure function of the one before."""
    start = read_structure(simulate.ALANINE).atoms.positions.astype(float)
    state = {
        "positions": np.repeat(start[None], walkers, axis=0),
        "bias_after": np.zeros((BIAS_BINS, BIAS_BINS)),
    }
    dynamics = Walkers()
    for k, stage in enumerate(stages(chunks)):
        file = folder / f"{stage.name}.npz"
        if not file.is_file():
            run = dynamics.run(
                state["positions"],
                state.get("velocities"),
                state["bias_after"],
                stage.steps,
                [seed, k],
                deposit_kT=stage.deposit_kT,
            )
            bias = refined(run) if stage.name.startswith("refine") else run.bias
            write_npz(file, asdict(run) | {"bias_after": bias})
            print(f"{stage.name}: {time.ctime()}, {run.sound.mean():.4f} sound", flush=True)
        state = read_npz(file)


def refined(run: Run, least: int = 20) -> np.ndarray:
    """Return a new bias from the frames of a static one, of bins with at least so many frames."""
    later = run.angles[len(run.angles) // 10 :].reshape(-1, 2)
    counts = len(later) * torsion_histogram(later, bins=len(run.bias))
    # Bins that were hardly visited keep their place relative to those visited least.
    return flattened.capped(-run.bias - np.log(np.maximum(counts, least)))


# ------------------------------------------------------------------------------- what they give


@dataclass(frozen=True)
class Frames:
    """The static stages of R walkers.

    Attributes
    ----------
    angles
        φ, ψ in rad, float32 (F, R, 2).
    bias
        Under which they ran.
    calls, dropped
        Energy calls of all stages, and walkers that were left out.
    """

    angles: np.ndarray
    bias: PeriodicBias
    calls: int
    dropped: int

    @classmethod
    def load(cls, folder: Path) -> Frames:
        """Read the stages that are there, without walkers that lost a trans bond or chirality."""
        parts = {f.stem: read_npz(f) for f in sorted(folder.glob("*.npz"))}
        static = [part for name, part in parts.items() if name.startswith("static")]
        sound = np.all([part["sound"] for part in parts.values()], axis=0)
        calls = {stage.name: stage.steps + 1 for stage in stages(len(static))}
        return cls(
            np.concatenate([part["angles"][:, sound] for part in static]),
            PeriodicBias(static[0]["bias"]),
            sum(calls[name] for name in parts) * len(sound),
            int((~sound).sum()),
        )

    def weighted(self) -> np.ndarray:
        """Return sums of the weights that take the bias off, as `sums`."""
        rows = [self.bias.of_angles(torch.from_numpy(row.astype(float))) for row in self.angles]
        return self.sums(torch.stack(rows).exp().numpy())

    def sums(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Return sums of weights (F, R), or counts, of each walker: (R, FINE, FINE)."""
        walkers = self.angles.shape[1]
        place = np.floor((self.angles + np.pi) * (FINE / (2 * np.pi))).astype(int) % FINE
        flat = (np.arange(walkers) * FINE + place[..., 0]) * FINE + place[..., 1]
        each = None if weights is None else weights.ravel()
        found = np.bincount(flat.ravel(), each, minlength=walkers * FINE**2)
        return found.reshape(walkers, FINE, FINE)


def analyse(folder: Path) -> dict[str, np.ndarray]:
    """Return what the reference file holds, see the README of the benchmarks."""
    frames = Frames.load(folder)
    weighted, counts = frames.weighted(), frames.sums().sum(0)
    half = FINE // 2
    sides = np.stack([weighted[:, :half].sum((1, 2)), weighted[:, half:].sum((1, 2))], axis=1)
    found = {
        "difference_kT": _difference(sides.sum(0)),
        "difference_error_kT": _bootstrap(sides, _difference),
        "calls": frames.calls,
        "frames": frames.angles[..., 0].size,
        "walkers": frames.angles.shape[1],
        "walkers_dropped": frames.dropped,
        "crossings": crossings(frames.angles),
        "temperature_K": flattened.TEMPERATURE_K,
        "timestep_fs": Walkers.timestep_fs,
        "friction_per_ps": Walkers.friction_per_ps,
        "hydrogen_Da": flattened.HYDROGEN_DA,
        "bias_weights_kT": frames.bias.weights.numpy(),
    }
    for bins in GRIDS:
        sums = coarser(weighted, bins)
        free = free_energy(sums.sum(0) / sums.sum())
        centre = torsion_centres(bins)
        angles = torch.from_numpy(np.stack(np.meshgrid(centre, centre, indexing="ij"), -1))
        flat = frames.bias.of_angles(angles.reshape(-1, 2)).numpy().reshape(bins, bins)
        at_centres = np.log(sums.sum(0).max()) - flat - _log_at_centres(coarser(counts, bins))
        found |= {
            f"free_energy_kT_{bins}": free,
            f"error_kT_{bins}": _bootstrap(sums, partial(_relative, region=surface.below(free))),
            f"at_centres_kT_{bins}": at_centres,
            f"grid_deg_{bins}": np.degrees(centre),
        }
    return found


def equilibrium(folder: Path, seed: int, count: int = 100, steps: int = 200) -> ReferenceData:
    """Return frames without a bias: short dynamics from frames of the reference, drawn by weight.

    Each walker leaves `count` frames, `steps` apart, after ten times as long that is left out.
    Methyl groups turn slowly, and all walkers began with one structure: hydrogens change their
    names by a third of a turn, at random, which makes the three places of each equally likely.
    """
    ends = [read_npz(file) for file in sorted(folder.glob("static_*.npz"))]
    sound = np.all([end["sound"] for end in ends], axis=0)
    positions = np.concatenate([end["positions"][sound] for end in ends])
    angles = torch.from_numpy(dihedral_angles(positions, np.array(PHI_PSI)))
    weights = PeriodicBias(ends[0]["bias"]).of_angles(angles).exp().numpy()
    walkers, rng = len(sound), np.random.default_rng(seed)
    place = (np.arange(walkers) + rng.random()) / walkers
    drawn = np.searchsorted(np.cumsum(weights) / weights.sum(), place)
    starts = positions[drawn]
    for methyl in METHYLS:
        turn = (rng.integers(3, size=(walkers, 1)) + np.arange(3)) % 3
        starts[:, methyl] = np.take_along_axis(starts[:, methyl], turn[..., None], axis=1)
    dynamics, flat = Walkers(), np.zeros_like(ends[0]["bias"])
    run = dynamics.run(starts, None, flat, 10 * steps, [seed, 0])
    frames, energies = [], []
    for k in range(count):
        run = dynamics.run(run.positions, run.velocities, flat, steps, [seed, k + 1])
        frames.append(run.positions)
        energies.append(dynamics.energies(torch.from_numpy(run.positions), None).energies[:, 0])
    return ReferenceData(
        np.stack(frames, axis=1).reshape(-1, *positions.shape[1:]),
        energy=np.stack(energies, axis=1).ravel(),
        walker=np.repeat(np.arange(walkers), count),
        time_ps=np.tile((np.arange(count) + 1) * steps * dynamics.timestep_fs * 1e-3, walkers),
    )


def coarser(fine: np.ndarray, bins: int) -> np.ndarray:
    """Return sums of the fine bins (..., FINE, FINE) in (..., bins, bins)."""
    k = FINE // bins
    return fine.reshape(*fine.shape[:-2], bins, k, bins, k).sum((-3, -1))


def _log_at_centres(counts: np.ndarray) -> np.ndarray:
    """Return ln p at the centres of bins, of a nearly flat density; NaN where none was seen."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.log(counts)
        second = sum(np.roll(mean, k, axis) - mean for k in (-1, 1) for axis in (0, 1))
    # A mean exceeds the centre by 1/24 of the second differences, up to fourth order.
    known = np.where(np.isfinite(mean), mean, np.nan)
    return known - np.where(np.isfinite(second), second, 0.0) / 24


def crossings(angles: np.ndarray) -> int:
    """Return how often walkers went between 30° < φ < 150° and -150° < φ < -30°."""
    phi = np.degrees(angles[..., 0])
    side = np.where((np.abs(phi) > 30) & (np.abs(phi) < 150), np.sign(phi), 0)
    return sum(int((np.diff(own[own != 0]) != 0).sum()) for own in side.T)


def _difference(sides: np.ndarray) -> np.ndarray:
    return np.log(sides[0]) - np.log(sides[1])


def _relative(density: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Return F in kT less its mean over the region."""
    with np.errstate(divide="ignore"):
        free = -np.log(density)
    return free - free[region].mean()


def _bootstrap(sums: np.ndarray, finish: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the error of what follows from sums of walkers, (R, ...); NaN where one is empty."""
    with np.errstate(invalid="ignore"):
        return bootstrap_error(np.ones(len(sums)), sums, finish, DRAWS, seed=0)


# -------------------------------------------------------------------------------------- checks


def checks(folder: Path, stored: Path) -> Iterator[str]:
    """Compare the reference with itself, with stored molecular dynamics, and with shorter steps."""
    frames = Frames.load(folder)
    sums = coarser(frames.weighted(), GRIDS[0])
    region = surface.below(free_energy(sums.sum(0) / sums.sum()))
    yield "half of the walkers, the other half: " + _compare(sums[::2], sums[1::2], region)
    halves = [
        coarser(replace(frames, angles=half).weighted(), GRIDS[0])
        for half in np.array_split(frames.angles, 2)
    ]
    yield "first half of the time, second half: " + _compare(*halves, region)
    positions = ReferenceData.load(stored).positions
    # Walkers are stored one after another, each a whole number of blocks.
    blocks = dihedral_angles(positions, np.array(PHI_PSI)).reshape(100, -1, 2).swapaxes(0, 1)
    counts = coarser(replace(frames, angles=blocks).sums(), GRIDS[0])
    often = (counts.sum(0) >= 200) & ((counts > 0).sum(0) >= 20)
    yield f"{stored.name}, {often.sum()} bins: " + _compare(counts, sums, often)
    short = half_step(folder, 5000)
    others = coarser(replace(frames, angles=short["angles"]).weighted(), GRIDS[0])
    seen = region & ((others > 0).sum(0) >= 20)
    yield f"steps half as long, {seen.sum()} bins: " + _compare(others, sums, seen)
    energies = [read_npz(file)["energy_eV"] for file in sorted(folder.glob("static_*.npz"))]
    yield "mean energy under the bias, eV: {}; steps half as long: {}".format(
        _mean(np.concatenate(energies)), _mean(short["energy_eV"])
    )


def half_step(folder: Path, steps: int) -> dict[str, np.ndarray]:
    """Run the walkers under the same bias with half the time step, once; a tenth is left out."""
    file = folder / "half_step" / "run.npz"
    if not file.is_file():
        start = read_npz(folder / "relax.npz")
        dynamics = Walkers(timestep_fs=Walkers.timestep_fs / 2)
        run = dynamics.run(
            start["positions"], start["velocities"], start["bias_after"], steps, [1], every=40
        )
        write_npz(file, {"angles": run.angles, "energy_eV": run.energy_eV})
    return {key: values[len(values) // 10 :] for key, values in read_npz(file).items()}


def _compare(one: np.ndarray, other: np.ndarray, region: np.ndarray) -> str:
    """Say how far two surfaces are apart, from sums (R, n, n), in units of their errors."""
    relative = partial(_relative, region=region)
    apart = relative(one.sum(0))[region] - relative(other.sum(0))[region]
    error = np.hypot(*(_bootstrap(sums, relative)[region] for sums in (one, other)))
    return (
        f"rms difference {np.sqrt(np.mean(apart**2)):.3f} kT, of its errors "
        f"{np.sqrt(np.mean(error**2)):.3f} kT; mean square in errors "
        f"{np.mean((apart / error) ** 2):.2f}, greatest {np.abs(apart / error).max():.1f}"
    )


def _mean(series: np.ndarray, blocks: int = 10) -> str:
    means = [block.mean() for block in np.array_split(series, blocks)]
    return f"{np.mean(means):.5f} ± {np.std(means, ddof=1) / blocks**0.5:.5f}"

"""F(φ, ψ) on n x n bins against a reference, ΔF between φ > 0 and φ < 0, and files of both.

All in kT, axes φ and ψ from -π. The region that counts are the bins below 10 kT in the reference.
The free constant of a surface is chosen by the mean difference over this region, each bin alike. A
bin that a method never visited counts with 10 kT above the lowest bin that it did visit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import logsumexp

from ccg_ase.units import thermal_energy
from ccg_training.metrics import free_energy, torsion_histogram
from ccg_training.reference import read_npz, write_npz

REGION_KT = 10.0
REFERENCE = "reference.npz"
SHIPPED = Path(__file__).parent / "alanine_surface.npz"


def reference_file(folder: Path) -> Path:
    """Return the reference in a folder, or the one that lies beside this file."""
    return own if (own := folder / REFERENCE).is_file() else SHIPPED


@dataclass(frozen=True)
class Reference:
    """The reference on one grid.

    Attributes
    ----------
    free_energy, error
        Of bins, (n, n); the lowest is zero, and the error is that of F less its mean over the
        region. Bins never visited are NaN.
    at_centres
        F at the centres of the bins, on the same scale; in steep places they are far apart.
    difference, difference_error
        F(φ > 0) - F(φ < 0).
    """

    free_energy: np.ndarray
    error: np.ndarray
    at_centres: np.ndarray
    difference: float
    difference_error: float

    @classmethod
    def load(cls, path: str | Path, bins: int) -> Reference:
        """Read the grid of `bins` x `bins` of a file that `free_energy_surface.py` wrote."""
        stored = read_npz(path)
        return cls(
            stored[f"free_energy_kT_{bins}"],
            stored[f"error_kT_{bins}"],
            stored[f"at_centres_kT_{bins}"],
            float(stored["difference_kT"]),
            float(stored["difference_error_kT"]),
        )

    @property
    def region(self) -> np.ndarray:
        """The bins that count, bool (n, n)."""
        return below(self.free_energy)

    @property
    def noise(self) -> float:
        """Root mean square of the error over the region."""
        return float(np.sqrt(np.mean(self.error[self.region] ** 2)))


@dataclass(frozen=True)
class Curve:
    """Surfaces of one method after so many energy calls.

    Attributes
    ----------
    calls
        (m,): all energy calls up to there, of one seed.
    free_energy
        (seeds, m, n, n), NaN where nothing was found yet.
    at_centres
        Whether F is that of the centres of bins.
    """

    calls: np.ndarray
    free_energy: np.ndarray
    at_centres: bool = False

    def save(self, path: str | Path) -> None:
        """Write the arrays ``calls`` and ``free_energy_kT``."""
        write_npz(path, {"calls": self.calls, "free_energy_kT": self.free_energy})

    @property
    def bins(self) -> int:
        """Bins per axis."""
        return self.free_energy.shape[-1]


def curves_of(path: str | Path, before: int = 0) -> dict[str, Curve]:
    """Return what a file holds: the curve of `Curve.save`, or the ways of `ccg free-energy`.

    `before` counts the calls that were spent before, on reference data and training.
    """
    stored = read_npz(path)
    if "free_energy_kT" in stored:
        calls, surfaces = np.atleast_1d(stored["calls"]), stored["free_energy_kT"]
        n = surfaces.shape[-1]
        return {"": Curve(before + calls, surfaces.reshape(-1, len(calls), n, n))}
    at_centres = json.loads(str(stored["settings"]))["centres"] == "True"
    found = {}
    for way in ("direct", "bead_ensemble"):
        if f"{way}_free_energy" in stored:
            kT = thermal_energy(float(stored[f"{way}_temperature_K"]))
            calls = before + np.atleast_1d(stored[f"{way}_n_calls"])
            surfaces = stored[f"{way}_free_energy"][None, None] / kT
            found[way.replace("_", " ")] = Curve(calls, surfaces, at_centres)
    return found


def below(surface: np.ndarray, limit_kT: float = REGION_KT) -> np.ndarray:
    """Tell which bins lie less than so far above the lowest; NaN doesn't."""
    return surface - np.nanmin(surface) < limit_kT


def of_angles(angles: np.ndarray, bins: int, log_weights: np.ndarray | None = None) -> np.ndarray:
    """Return F of frames (N, 2) in rad, (bins, bins); bins that none visits are NaN."""
    return free_energy(torsion_histogram(angles, log_weights, bins))


def of_density(log_density: np.ndarray, bins: int) -> np.ndarray:
    """Return F of bins from ln p on a finer grid, (k·bins, k·bins), of bins of equal size."""
    k = len(log_density) // bins
    parts = log_density.reshape(bins, k, bins, k)
    surface = -logsumexp(parts, axis=(1, 3))
    return surface - surface.min()


def difference(surface: np.ndarray) -> float:
    """Return F(φ > 0) - F(φ < 0) in kT; infinite if φ > 0 was never visited."""
    half = len(surface) // 2
    share = np.exp(-np.where(np.isnan(surface), np.inf, surface - np.nanmin(surface)))
    with np.errstate(divide="ignore"):
        return float(np.log(share[:half].sum()) - np.log(share[half:].sum()))


def deviation(surface: np.ndarray, reference: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Return F - F_reference of the bins of a region, in kT, without its mean, (bins,)."""
    filled = np.where(np.isnan(surface), np.nanmin(surface) + REGION_KT, surface)
    apart = filled[region] - reference[region]
    return apart - apart.mean()


def rms_error(surface: np.ndarray, reference: Reference, *, at_centres: bool) -> float:
    """Return the rms error over the region."""
    truth = reference.at_centres if at_centres else reference.free_energy
    return float(np.sqrt(np.mean(deviation(surface, truth, reference.region) ** 2)))


def unvisited(surface: np.ndarray, reference: Reference) -> float:
    """Return the share of the region that a method never visited."""
    return float(np.isnan(surface[reference.region]).mean())


def told(value: float, spread: float) -> str:
    """Say a mean and its spread; nothing, or no spread, where it isn't known."""
    if np.isnan(value):
        return ""
    return f"{value:.2f}" if np.isnan(spread) else f"{value:.2f} ± {spread:.2f}"


def mean_and_spread(values: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation over seeds; NaN unless all of them are finite."""
    if not np.isfinite(values).all():
        return np.nan, np.nan
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else np.nan

"""Free energies of bins from the samples in them, of basins, and how two ways agree.

F of a bin is -kT ln of its probability P, so that sums over bins are those of probabilities and a
histogram of long dynamics estimates the same figure. Bins that fail the gate have no F (NaN).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ccg_ase.units import thermal_energy
from ccg_mda.bounds import log_partition, normalised_weights
from ccg_mda.weights import effective_sample_size

from .estimators import at_temperature, thermodynamics
from .free_energy_direct import Proposal
from .free_energy_grid import Grid
from .free_energy_sampling import BinSamples, Sampled, Sampling, good_enough

_REPLICAS = 400
_NEGLIGIBLE = 0.01


@dataclass(frozen=True, eq=False)
class Landscape:
    """F on a grid, with what it rests on; arrays are (n_points,), NaN where not trusted.

    Attributes
    ----------
    grid, temperature_K
        Where, and at which temperature.
    free_energy, error
        F in eV above the lowest bin; errors are those of F against the mean over all bins,
        weighted by their probability.
    energy, energy_error
        E[U] in the bin, eV.
    entropy, entropy_error
        (E[U] - F)/T, eV/K, up to the constant that F is known up to.
    effective, n_samples
        Number of effective samples, and of samples.
    trusted
        Passed the gate.
    above
        Clearly above the cut-off.
    rough
        ln P of all bins that have samples, trusted or not: what may be missing is judged by it.
    log_p_replicas
        Replicas of ln P, (n_replicas, n_points): what errors of any function of F come from.
    n_calls
        Energy calls.
    """

    grid: Grid
    temperature_K: float
    free_energy: np.ndarray
    error: np.ndarray
    energy: np.ndarray
    energy_error: np.ndarray
    entropy: np.ndarray
    entropy_error: np.ndarray
    effective: np.ndarray
    n_samples: np.ndarray
    trusted: np.ndarray
    above: np.ndarray
    rough: np.ndarray
    log_p_replicas: np.ndarray
    n_calls: int

    @property
    def kT(self) -> float:
        """Thermal energy in eV."""
        return thermal_energy(self.temperature_K)

    @property
    def doubtful(self) -> np.ndarray:
        """Bins that are neither trusted nor clearly above the cut-off, (n_points,)."""
        return ~self.trusted & ~self.above

    @property
    def probability(self) -> np.ndarray:
        """P over the trusted bins, (n_points,), zero elsewhere."""
        return normalised_weights(np.where(self.trusted, -self.free_energy / self.kT, -np.inf))


def landscape(
    sampled: Sampled,
    proposal: Proposal,
    temperature_K: float,
    settings: Sampling,
    *,
    at_K: float | None = None,
) -> Landscape:
    """Work out F, energy and entropy of every bin.

    Parameters
    ----------
    sampled, proposal
        From `sample_grid`.
    temperature_K
        Temperature of the weights.
    settings
        The gate.
    at_K
        Another temperature, to which the samples are reweighted (E4); the gate is applied again.

    Raises
    ------
    ValueError
        If no bin passes the gate.
    """
    T, bins = temperature_K, sampled.bins
    if at_K is not None:
        T = at_K
        bins = [
            one._replace(log_weight=at_temperature(one.log_weight, one.energy, temperature_K, T))
            for one in bins
        ]
    kT, n = thermal_energy(T), len(bins)
    trusted = np.array([good_enough(one.log_weight, settings) for one in bins])
    log_p, error = np.full(n, -np.inf), np.zeros(n)
    parts = np.full((4, n), np.nan)
    effective = np.zeros(n)
    for point in np.flatnonzero([len(one.energy) >= 2 for one in bins]):
        one = bins[point]
        effective[point] = effective_sample_size(one.log_weight) * len(one.energy)
        log_z = log_partition(one.log_weight[None]).value[0]
        log_p[point] = log_z + proposal.log_share[point]
        if trusted[point]:
            error[point] = _error_of_clusters(one)
            split = thermodynamics(one.log_weight[None], one.energy[None], T)
            of_share = log_p[point] - log_z
            entropy = split.entropy.value[0] + kT * of_share / T
            scale = error[point] / max(float(split.free_energy.error[0]) / kT, 1e-300)
            parts[:, point] = (
                split.energy.value[0],
                split.energy.error[0] * scale,
                entropy,
                split.entropy.error[0] * scale,
            )
    trusted &= np.isfinite(error)
    if not trusted.any():
        raise ValueError(
            f"no bin has weights that can be trusted at {T:g} K (best: {effective.max():.1f} "
            f"effective samples, {settings.min_effective:g} are needed): more samples, a better "
            "model, or a temperature nearer to its own"
        )
    normals = np.random.default_rng(0).standard_normal((_REPLICAS, n))
    share = proposal.log_share_replicas
    drawn = np.where(trusted, log_p, 0.0) + normals * error
    moved = np.where(trusted, share, 0.0) - np.where(trusted, proposal.log_share, 0.0)
    drawn += moved[np.arange(_REPLICAS) % len(share)]
    return _relative(
        grid=proposal.grid,
        temperature_K=T,
        log_p=np.where(trusted, log_p, -np.inf),
        replicas=np.where(trusted, drawn, -np.inf),
        parts=parts,
        effective=effective,
        n_samples=np.array([len(one.energy) for one in bins]),
        above=sampled.above,
        rough=log_p,
        n_calls=sampled.n_calls,
    )


def _relative(
    *,
    grid: Grid,
    temperature_K: float,
    log_p: np.ndarray,
    replicas: np.ndarray,
    parts: np.ndarray,
    above: np.ndarray,
    rough: np.ndarray,
    effective: np.ndarray,
    n_samples: np.ndarray,
    n_calls: int,
) -> Landscape:
    """Normalise P and its replicas, and take F from the lowest bin."""
    kT, trusted = thermal_energy(temperature_K), np.isfinite(log_p)
    weight = normalised_weights(log_p)
    # A common factor of a replica means nothing: compare them at equal mean of F.
    known = np.where(trusted, replicas, 0.0)
    known = known - (known @ weight)[:, None]
    free_energy = np.where(trusted, -kT * (log_p - log_p[trusted].max()), np.nan)
    return Landscape(
        grid=grid,
        temperature_K=temperature_K,
        free_energy=free_energy,
        error=np.where(trusted, kT * known.std(0, ddof=1), np.nan),
        energy=parts[0],
        energy_error=parts[1],
        entropy=parts[2],
        entropy_error=parts[3],
        effective=effective,
        n_samples=n_samples,
        trusted=trusted,
        above=above,
        rough=rough - log_p[trusted].max(),
        log_p_replicas=np.where(trusted, known, -np.inf),
        n_calls=n_calls,
    )


def _error_of_clusters(one: BinSamples) -> float:
    """Linearised error of ln Z (E2) with samples of one cluster added up before squaring."""
    influence = normalised_weights(one.log_weight) - 1 / len(one.log_weight)
    _, number = np.unique(one.cluster, return_inverse=True)
    sums = np.bincount(number, influence)
    n = len(sums)
    return float(np.sqrt(n / (n - 1) * (sums**2).sum())) if n > 1 else np.inf


def marginal(whole: Landscape, keep: list[int]) -> Landscape:
    """Sum probabilities over all variables but some.

    A bin of the result is doubtful where doubtful bins hold more than a hundredth of it, by their
    rough estimates; below that they count for nothing.

    Parameters
    ----------
    whole
        The landscape over all variables.
    keep
        Numbers of the variables that stay, in their new order.
    """
    shape, d = whole.grid.shape, len(whole.grid.shape)
    rest = [k for k in range(d) if k not in keep]
    n_kept = int(np.prod([shape[k] for k in keep]))

    def rows(array: np.ndarray) -> np.ndarray:
        lead = array.ndim - 1
        axes = [*range(lead), *(lead + k for k in (*keep, *rest))]
        turned = array.reshape(*array.shape[:-1], *shape).transpose(axes)
        return turned.reshape(*array.shape[:-1], n_kept, -1)

    kT, T = whole.kT, whole.temperature_K
    each = np.where(whole.trusted, -whole.free_energy / kT, -np.inf)
    missing = np.where(whole.doubtful, whole.rough, -np.inf)
    sums, replicas, lost, rough = (
        np.logaddexp.reduce(rows(array), axis=-1)
        for array in (each, whole.log_p_replicas, missing, whole.rough)
    )
    log_p = np.where(lost > sums + np.log(_NEGLIGIBLE), -np.inf, sums)
    share = normalised_weights(rows(each))
    energies = np.where(share > 0, rows(np.where(whole.trusted, whole.energy, 0.0)), 0.0)
    energy = (share * energies).sum(-1)
    spread = (normalised_weights(rows(whole.log_p_replicas)) * energies).sum(-1).std(0, ddof=1)
    own = np.sqrt(np.nansum((share * rows(np.nan_to_num(whole.energy_error))) ** 2, -1))
    energy_error = np.hypot(spread, own)
    entropy = (energy + kT * sums) / T
    parts = np.array([energy, energy_error, entropy, energy_error / T])
    parts[:, ~np.isfinite(log_p)] = np.nan
    return _relative(
        grid=Grid(
            tuple(whole.grid.variables[k] for k in keep), tuple(whole.grid.edges[k] for k in keep)
        ),
        temperature_K=T,
        log_p=log_p,
        replicas=np.where(np.isfinite(log_p), replicas, -np.inf),
        parts=parts,
        above=rows(whole.above).all(-1),
        rough=rough,
        effective=rows(whole.effective).sum(-1),
        n_samples=rows(whole.n_samples).sum(-1),
        n_calls=whole.n_calls,
    )


class Basins(NamedTuple):
    """Free energies of B basins against the first one, in eV, and what they leave out.

    Attributes
    ----------
    difference, error
        F_b - F_0, (B,).
    doubtful
        Bins of each basin that are neither trusted nor clearly above the cut-off, (B,).
    missing
        Their share of the basin's probability by their rough estimates, (B,): what the difference
        and its error leave out.
    """

    difference: np.ndarray
    error: np.ndarray
    doubtful: np.ndarray
    missing: np.ndarray


def basin_differences(of: Landscape, masks: list[np.ndarray]) -> Basins:
    """Return F_A = -kT ln Σ_A exp(-F/kT) of basins against the first.

    Parameters
    ----------
    of
        The landscape.
    masks
        Bins of each basin, (n_points,) bool; see `Grid.basin`.

    Raises
    ------
    ValueError
        If a basin has no trusted bin.
    """
    for number, mask in enumerate(masks):
        if not (mask & of.trusted).any():
            raise ValueError(
                f"basin {number + 1} holds no bin that can be trusted: raise --max-kT or --samples"
            )
    log_p = np.where(of.trusted, -of.free_energy / of.kT, -np.inf)
    value = np.array([np.logaddexp.reduce(log_p[mask]) for mask in masks])
    each = np.stack([np.logaddexp.reduce(of.log_p_replicas[:, mask], axis=1) for mask in masks])
    spread = (each - each[0]).std(1, ddof=1)
    doubtful = np.array([int((mask & of.doubtful).sum()) for mask in masks])
    lost = np.where(of.doubtful, of.rough, -np.inf)
    lost = np.array([np.logaddexp.reduce(lost[mask]) for mask in masks])
    missing = np.exp(lost - np.logaddexp(value, lost))
    return Basins(-of.kT * (value - value[0]), of.kT * spread, doubtful, missing)


class Agreement(NamedTuple):
    """How far two landscapes are apart below a cut-off, in kT, over the bins that both trust."""

    n_bins: int
    rms_kT: float
    expected_rms_kT: float
    largest_kT: float


def agreement(one: Landscape, other: Landscape, max_kT: float) -> Agreement:
    """Compare two landscapes on one grid, aligned at equal mean of F over the common bins.

    Parameters
    ----------
    one, other
        Of one grid and temperature.
    max_kT
        Bins higher than this, in `one`, are left out.

    Returns
    -------
    Agreement
        With the root mean square that the error bars let expect.
    """
    kT = one.kT
    common = one.trusted & other.trusted
    low = common & (np.nan_to_num(one.free_energy, nan=np.inf) <= max_kT * kT)
    if not low.any():
        return Agreement(0, np.nan, np.nan, np.nan)
    gap = (one.free_energy - other.free_energy)[low] / kT
    variance = (one.error**2 + other.error**2)[low] / kT**2
    # By inverse variance: bins that are known well decide the common zero.
    weight = 1 / np.maximum(variance, 1e-12)
    gap = gap - (weight * gap).sum() / weight.sum()
    return Agreement(
        int(low.sum()),
        float(np.sqrt((gap**2).mean())),
        float(np.sqrt(variance.mean())),
        float(np.abs(gap).max()),
    )

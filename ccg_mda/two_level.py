"""Two-level weights: of bead frames, and of the atoms that were reconstructed on them."""

from __future__ import annotations

from dataclasses import dataclass

import MDAnalysis as mda
import numpy as np

from ccg_mda.weights import (
    FreeEnergy,
    effective_sample_size,
    flat_log_weights,
    log_mean_exp,
    pareto_k,
    read_weights,
    warn_if_few,
    weighted_average,
)


@dataclass(frozen=True, eq=False)
class TwoLevelWeights:
    """What carries bead frames s_i, with K_i reconstructions x_ik each, to the atomistic ensemble.

    Averages are Σ_i W_i Σ_k w̄_ik O(x_ik) / Σ_i W_i with W_i = Ẑ(s_i) u_i, right for any backmapper
    and any bead force field that reach everything, since Ẑ is unbiased (pseudo-marginal; Andrieu,
    Roberts, Ann. Statist. 37, 697 (2009)). How many bead frames count, and how many reconstructions
    of each, is told apart: a better bead force field helps the former, a better backmapper both.

    Attributes
    ----------
    log_w
        Per frame, (n_frames,): ln w_ik = -U/kT - ln q + ln u_i - ln(K_i/K̄), with K̄ the mean of
        K_i. The last term is zero where all bead frames have as many samples; then it is what
        `log_weights` gives with ``free_energy``.
    bead
        Bead frame of every frame, (n_frames,), counted from 0.
    log_z
        Per bead frame, (n_bead_frames,): ln Ẑ(s_i), of the mean weight of its samples given s_i.
    log_bead_weights
        ln W_i = ln Ẑ(s_i) + ln u_i, (n_bead_frames,).
    """

    log_w: np.ndarray
    bead: np.ndarray
    log_z: np.ndarray
    log_bead_weights: np.ndarray

    @classmethod
    def combine(
        cls, given_beads: np.ndarray, bead: np.ndarray, bead_log_w: np.ndarray
    ) -> TwoLevelWeights:
        """Work them out from -U/kT - ln q (n_frames,), bead frames, and ln u (n_bead_frames,)."""
        given_beads, bead_log_w = flat_log_weights(given_beads), flat_log_weights(bead_log_w)
        count = np.bincount(bead, minlength=len(bead_log_w))
        in_order = given_beads[np.argsort(bead, kind="stable")]
        samples = np.split(in_order, np.cumsum(count)[:-1])
        log_z = np.array([log_mean_exp(log_w)[0] for log_w in samples])
        return cls(
            log_w=given_beads + (bead_log_w - np.log(count / count.mean()))[bead],
            bead=bead,
            log_z=log_z,
            log_bead_weights=log_z + bead_log_w,
        )

    @property
    def ess_beads(self) -> float:
        """Kish's effective sample size of the W_i, as a fraction."""
        return float(effective_sample_size(self.log_bead_weights))

    @property
    def ess_atoms(self) -> float:
        """The same of the samples of a bead frame: harmonic mean with weights W_i²; 1 for one."""
        return self.ess / self.ess_beads if self.ess_beads else 0.0

    @property
    def ess(self) -> float:
        """The same of all frames: the product of the two."""
        return float(effective_sample_size(self.log_w))

    @property
    def pareto_k(self) -> float:
        """Tail shape of the W_i."""
        return float(pareto_k(self.log_bead_weights))

    @property
    def log_ratio(self) -> float:
        """Ln of the mean W: with u = exp(F/kT), an estimate of ln(Z of atoms / Z of beads)."""
        return float(log_mean_exp(self.log_bead_weights)[0])

    def average(self, values: np.ndarray, *, n_blocks: int = 20) -> tuple[np.ndarray, np.ndarray]:
        """Average over the atomistic ensemble.

        Parameters
        ----------
        values
            O, (n_frames, ...).
        n_blocks
            Contiguous blocks of bead frames that count as independent; a block must outlast the
            correlation of the beads in time.

        Returns
        -------
        mean, error
            (...), as by `weighted_average`.
        """
        with np.errstate(invalid="ignore"):  # bead frames of weight zero
            share = np.exp(self.log_w - self.log_bead_weights[self.bead])
        share = np.where(np.isfinite(self.log_w), share, 0.0) * len(self.log_z) / len(self.log_w)
        share = share.reshape(-1, *[1] * (np.ndim(values) - 1))
        per_bead = np.zeros((len(self.log_z), *np.shape(values)[1:]))
        np.add.at(per_bead, self.bead, share * np.where(share > 0, values, 0.0))
        return weighted_average(per_bead, self.log_bead_weights, n_blocks=n_blocks)


def two_level_weights(
    universe: mda.Universe,
    free_energy: FreeEnergy | None = None,
    temperature_K: float | None = None,
    *,
    bead_log_w: np.ndarray | None = None,
) -> TwoLevelWeights:
    """Weigh the bead frames of a backmapped Universe, and their reconstructions.

    A `UserWarning` says so if the W_i are fewer than 50 effective samples (Kish), or if their
    Pareto k exceeds 0.7.

    Parameters
    ----------
    universe, free_energy, temperature_K
        See `log_weights`.
    bead_log_w
        In place of F: ln u_i of every bead frame, shape (n_bead_frames,), where u is one over the
        density sampled, up to a factor. With a bias V (umbrella sampling) that is (F + V)/kT; with
        weights v that turn the frames into samples of exp(-F/kT) (replicas, MBAR), F/kT + ln v.

    Raises
    ------
    ValueError
        If neither or both of F and ``bead_log_w`` are given, or their shape doesn't fit.
    NoDataError
        If a frame carries no log weight.
    """
    if (free_energy is None) == (bead_log_w is None):
        raise ValueError("give either free_energy or bead_log_w")
    given_beads, bead, reduced = read_weights(universe, free_energy, temperature_K)
    bead_log_w = reduced if bead_log_w is None else flat_log_weights(bead_log_w)
    n_beads = bead.max() + 1
    if len(bead_log_w) != n_beads:
        raise ValueError(f"{len(bead_log_w)} log weights given for {n_beads} bead frames")
    weights = TwoLevelWeights.combine(given_beads, bead, bead_log_w)
    warn_if_few(weights.log_bead_weights, "bead frames")
    return weights

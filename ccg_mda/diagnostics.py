"""One call that says how good a backmapper is: weights, bounds of ln Z, torsions, structure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from MDAnalysis.lib.mdamath import triclinic_vectors
from torch import nn

from ccg_ase.devices import device_of
from ccg_ase.units import thermal_energy

from .bounds import Sandwich, forward_effective_sample_size, sandwich
from .coverage import TorsionCoverage, torsion_coverage
from .internals import measured, term_name
from .potential import Potential
from .structure import StructureReference, check_structure
from .structure_report import StructureReport
from .weights import PARETO_LIMIT, effective_sample_size, pareto_k

_MOST_ATOMS = 5_000_000  # atoms of all checked samples together, which bounds the memory


@dataclass(frozen=True, eq=False)
class WeightQuality:
    """What log-weights of samples and of frames say about q(x|s).

    Attributes
    ----------
    ess, pareto_k
        Per state, (S,): effective sample size as a fraction, and shape of the tail of the weights
        (below 0.5 good, above 0.7 a few samples rule).
    forward_ess
        Effective sample size seen from the frames, which notices what samples of q can't: a region
        that q misses.
    bounds
        Of ln Z(s), and the divergences between p and q.
    """

    ess: np.ndarray
    pareto_k: np.ndarray
    forward_ess: float
    bounds: Sandwich

    @classmethod
    def from_log_weights(
        cls, log_weight: np.ndarray, log_weight_frames: np.ndarray
    ) -> WeightQuality:
        """Measure log-weights of samples, (S, K), and of frames at the same states, (S, M)."""
        return cls(
            ess=effective_sample_size(log_weight, axis=1),
            pareto_k=pareto_k(log_weight, axis=1),
            forward_ess=forward_effective_sample_size(log_weight, log_weight_frames),
            bounds=sandwich(log_weight, log_weight_frames),
        )

    def summary(self) -> dict[str, float]:
        """Return the figures; ``pareto_k_poor`` is a share of states, the last four are in nats."""
        return {
            "ess_mean": float(self.ess.mean()),
            "ess_p5": float(np.percentile(self.ess, 5)),
            "pareto_k_median": float(np.median(self.pareto_k)),
            "pareto_k_poor": float(np.mean(self.pareto_k > PARETO_LIMIT)),
            "forward_ess": self.forward_ess,
            "lnZ_gap": float(self.bounds.gap.value),
            "lnZ_gap_error": float(self.bounds.gap.error),
            "reverse_kl": float(self.bounds.reverse_kl.value),
            "forward_kl": float(self.bounds.forward_kl.value),
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """Return a table: figure, value, what it says."""
        bounds, f = self.bounds, self.summary()
        return [
            (
                "effective sample size per state",
                f"{f['ess_mean']:.3f} mean, {f['ess_p5']:.3f} at 5 %",
                "share of samples that count in full; 1 is perfect",
            ),
            (
                "seen from held-out frames",
                f"{f['forward_ess']:.3f}",
                "the same, but notices regions that the samples never reach",
            ),
            (
                "Pareto k per state",
                f"{f['pareto_k_median']:.2f} median, {f['pareto_k_poor']:.1%} above {PARETO_LIMIT}",
                "tail of the weights; below 0.5 their variance is finite",
            ),
            (
                "gap between bounds of ln Z",
                f"{bounds.gap.value:.4g} ± {bounds.gap.error:.2g} nats",
                "0 is perfect",
            ),
            (
                "reverse, forward KL divergence",
                f"{bounds.reverse_kl.value:.4g}, {bounds.forward_kl.value:.4g} nats",
                "the two parts of the gap; below zero, data and model disagree",
            ),
        ]


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """What `diagnose` found.

    Attributes
    ----------
    frame
        Rows of the frames whose s was used, (S,).
    weights
        None without a potential.
    structure
        Of the samples as drawn, unweighted.
    coverage
        Of torsions at given s, by weighted samples where there are weights.
    n_calls
        Energy calls spent.
    """

    frame: np.ndarray
    weights: WeightQuality | None
    structure: StructureReport
    coverage: TorsionCoverage
    n_calls: int

    def summary(self) -> dict[str, float]:
        """Return all figures."""
        weights = {} if self.weights is None else self.weights.summary()
        return weights | self.coverage.summary() | self.structure.summary()

    def __str__(self) -> str:
        lines = [f"{len(self.frame)} states, {self.n_calls} energy calls"]
        if self.weights is not None:
            lines += ["", *_aligned([("weights", "", ""), *self.weights.rows()])]
        header = [("structure", "terms", "of terms", "of frames", "worst")]
        lines += ["", *_aligned(header + self.structure.rows())]
        if self.coverage.names:
            header = [("torsion at given s", "divergence (floor)", "uncovered (floor)")]
            lines += ["", *_aligned(header + self.coverage.rows())]
        return "\n".join(lines)


class StructureProbe:
    """Collects samples, batch by batch, for the checks that need no energy.

    Parameters
    ----------
    reference
        What is normal.
    n_states, n_samples
        S and K in all. Torsions of every sample are kept; structures of the first few samples of
        each state, where there are too many atoms for memory.
    """

    def __init__(self, reference: StructureReference, n_states: int, n_samples: int) -> None:
        self.reference = reference
        at_most = _MOST_ATOMS // (n_states * len(reference.topology))
        self._n_checked = min(n_samples, max(1, at_most))
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, samples: np.ndarray, frames: np.ndarray, box: np.ndarray | None = None) -> None:
        """Take samples (s, K, n_atoms, 3) and the frames (s, n_atoms, 3) of the same states."""
        s, K = samples.shape[:2]
        torsions = self.reference.rotatable
        boxes = np.repeat(box, K, axis=0) if np.ndim(box) == 2 else box
        drawn = measured(samples.reshape(s * K, *frames.shape[1:]), torsions, boxes)
        known = measured(frames, torsions, box)
        part = [drawn.reshape(s, K, -1), known, samples[:, : self._n_checked]]
        if box is not None:
            part.append(np.broadcast_to(np.asarray(box), (s, 6)))
        self._parts.append(tuple(part))

    def finish(
        self, log_weight: np.ndarray | None = None, seed: int = 0
    ) -> tuple[StructureReport, TorsionCoverage]:
        """Check all that was added; ``log_weight`` as in `torsion_coverage`."""
        columns = [np.concatenate(column) for column in zip(*self._parts, strict=True)]
        drawn, known, samples, *boxes = columns
        box = np.repeat(boxes[0], samples.shape[1], axis=0) if boxes else None
        reference = self.reference
        names = [term_name(reference.topology, sites) for sites in reference.rotatable]
        coverage = torsion_coverage(
            names, drawn, known, log_weight=log_weight, fold=reference.fold, seed=seed
        )
        return check_structure(reference, samples, box), coverage


def diagnose(
    backmapper: nn.Module,
    frames: np.ndarray,
    potential: Potential | None = None,
    n_states: int = 100,
    n_samples: int = 200,
    seed: int = 0,
    *,
    energies: np.ndarray | None = None,
    reference: StructureReference | None = None,
    box: np.ndarray | None = None,
    batch_size: int = 1024,
) -> Diagnostics:
    """Measure a backmapper at the s of held-out frames.

    Parameters
    ----------
    backmapper
        A `Backmapper`.
    frames
        Atomistic frames of the backmapper's temperature that it wasn't trained on,
        (n, n_atoms, 3), Å.
    potential
        Atomistic energy; called once per sample. Without it there are no weights: structure and
        torsion coverage only.
    n_states
        Frames used, evenly spaced.
    n_samples
        Samples drawn at the s of each of them.
    seed
        The result is a pure function of the arguments.
    energies
        Of the frames, (n,), eV; without them the potential is called for those used.
    reference
        What counts as a sound structure. Default: statistics of all frames.
    box
        Lengths in Å and angles in degrees, (6,) or (n, 6); the backmapper gets its cell vectors. A
        potential in a box has to know it by itself.
    batch_size
        Samples per pass; bounds the memory, and doesn't change the noise.

    Raises
    ------
    ValueError
        If shapes don't fit, or fewer than two frames or samples are given.
    """
    x = np.asarray(frames, dtype=np.float64)
    cg_map = backmapper.cg_map
    if x.ndim != 3 or x.shape[1:] != (cg_map.n_atoms, 3):
        raise ValueError(f"expected frames of shape (n, {cg_map.n_atoms}, 3), got {x.shape}")
    if n_samples < 2 or n_states < 2:
        raise ValueError(
            f"a spread needs at least two states and samples, got {n_states} and {n_samples}"
        )
    if reference is None:
        reference = StructureReference.from_frames(cg_map.atoms, x, box)
    chosen = np.linspace(0, len(x) - 1, min(n_states, len(x))).astype(int)
    x, boxes = x[chosen], box[chosen] if np.ndim(box) == 2 else box
    noise = backmapper.sample_noise(np.random.default_rng(seed), (n_samples, len(x)))
    probe = StructureProbe(reference, len(x), n_samples)
    kT, calls = thermal_energy(backmapper.temperature_K), 0
    log_weight, log_weight_frames = [], []
    for rows in np.array_split(np.arange(len(x)), math.ceil(len(x) * n_samples / batch_size)):
        if not len(rows):  # a state alone has more samples than a batch
            continue
        here = boxes[rows] if np.ndim(boxes) == 2 else boxes
        keywords = {} if here is None else {"box": _cell_vectors(here)}
        known = torch.from_numpy(x[rows]).to(device_of(backmapper))
        with torch.no_grad():
            distribution = backmapper(cg_map.apply(known), **keywords)
            drawn, log_q = distribution.positions_and_log_prob_from(noise[:, rows])
            samples, log_q = drawn.transpose(0, 1).cpu().numpy(), log_q.T.cpu().numpy()
            if potential is not None:
                log_q_frames = distribution.log_prob(known).cpu().numpy()
        probe.add(samples, x[rows], here)
        if potential is not None:
            log_weight.append(-potential(samples)[0] / kT - log_q)
            calls += log_q.size
            if energies is None:
                energy = potential(x[rows])[0]
                calls += len(rows)
            else:
                energy = np.asarray(energies)[chosen[rows]]
            log_weight_frames.append(-energy / kT - log_q_frames)
    weights, log_w = None, None
    if potential is not None:
        log_w = np.concatenate(log_weight)
        on_frames = np.concatenate(log_weight_frames)[:, None]
        weights = WeightQuality.from_log_weights(log_w, on_frames)
    structure, coverage = probe.finish(log_w, seed)
    return Diagnostics(chosen, weights, structure, coverage, calls)


def _cell_vectors(box: np.ndarray) -> torch.Tensor:
    """Cell vectors as rows, (..., 3, 3), of boxes (..., 6)."""
    flat = np.reshape(box, (-1, 6))
    cells = np.stack([triclinic_vectors(row, dtype=np.float64) for row in flat])
    return torch.from_numpy(cells.reshape(*np.shape(box)[:-1], 3, 3))


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of a table as lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]

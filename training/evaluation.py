"""What a run measures about itself: the held-out check, and the arrays of the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from MDAnalysis.lib.formats.libdcd import DCDFile

from ccg_ase.energies import bead_energies
from ccg_ase.forcefield import ForceField
from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap, dihedral_angles
from ccg_ase.units import thermal_energy
from ccg_mda.diagnostics import StructureProbe, WeightQuality
from ccg_mda.flow import Backmapper
from ccg_mda.potential import Potential
from ccg_mda.structure import StructureReference
from ccg_mda.two_level import TwoLevelWeights
from ccg_mda.weights import effective_sample_size, pareto_k

from .estimators import (
    label_variance,
    to_kJ_per_mol,
)
from .reconstruction import Samples, pull_back_frames, reconstruct
from .reference import ReferenceData

RARE_KT = 4.0  # a state is rare if its torsion bin lies this much above the most populated one
_TORSION_BINS = 24


def dcd_frames(path: Path) -> np.ndarray:
    """Return all frames of a DCD file, (N, n_sites, 3) in Å."""
    with DCDFile(str(path)) as file:
        return file.readframes().xyz.astype(np.float64)


def longest_bond(frames: np.ndarray, cg_map: CGMap) -> float:
    """Return the longest bead bond of any frame, in Å."""
    i, j = cg_map.beads.bonds.T
    return float(np.linalg.norm(frames[..., i, :] - frames[..., j, :], axis=-1).max(initial=0.0))


def two_levels(samples: Samples, force_field: ForceField) -> TwoLevelWeights:
    """Weights of reconstructions of the bead ensemble of a force field (E6)."""
    energy, _ = bead_energies(force_field, samples.beads)
    n_states, n_samples = samples.log_weight.shape
    return TwoLevelWeights.combine(
        samples.log_weight.ravel(),
        np.repeat(np.arange(n_states), n_samples),
        energy / thermal_energy(samples.temperature_K),
    )


def torsions(beads: np.ndarray, cg_map: CGMap | TorsionMap) -> np.ndarray:
    """Return the first two torsions of the states (N, at most 2), in rad."""
    if isinstance(cg_map, TorsionMap):
        return beads[:, :2]
    return dihedral_angles(beads, cg_map.beads.dihedrals()[:2])


def rare_states(beads: np.ndarray, reference: np.ndarray, cg_map: CGMap | TorsionMap) -> np.ndarray:
    """Tell which states lie in torsion bins that the reference visits rarely, (N,) bool.

    Rare is a bin more than 4 kT above the most populated one, on a grid of 24 bins an axis.
    """
    if not torsions(beads[:1], cg_map).size:
        return np.zeros(len(beads), bool)

    def bins(states: np.ndarray) -> np.ndarray:
        angle = (torsions(states, cg_map) + np.pi) / (2 * np.pi)
        digits = np.minimum((angle * _TORSION_BINS).astype(int), _TORSION_BINS - 1)
        return digits @ _TORSION_BINS ** np.arange(digits.shape[1])

    counts = np.bincount(bins(reference), minlength=_TORSION_BINS**2)
    return counts[bins(states=beads)] < counts.max() * np.exp(-RARE_KT)


def held_out_check(
    flow: Backmapper,
    potential: Potential,
    train: ReferenceData,
    held_out: ReferenceData,
    *,
    n_states: int,
    n_samples: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Measure the flow at the beads of held-out frames, common and rare ones.

    Parameters
    ----------
    flow, potential
        What is measured, and the atomistic energy.
    train, held_out
        Reference frames; the former define what is rare, and what a sound structure is.
    n_states, n_samples
        States, drawn evenly in time, as many rare ones at most a third of that, and samples each.
    seed, progress
        Of the noise; called with states done and in all.

    Returns
    -------
    arrays, figures
        Per state: ``ess``, ``rare``, ``label_variance``, ``pareto_k`` and, of slice maps only,
        ``slice_variance`` ((eV/Å)²); tables of the report; and their summary. Bounds of ln Z (E1)
        and ``forward_ess`` use the common states, structures and torsions all of them.
    """
    cg_map = flow.cg_map
    beads = cg_map.apply(held_out.positions)
    rare = rare_states(beads, cg_map.apply(train.positions), cg_map)
    common = np.linspace(0, len(beads) - 1, min(n_states, len(beads))).astype(int)
    thin = np.flatnonzero(rare)
    thin = thin[np.linspace(0, len(thin) - 1, min(n_states // 3, len(thin))).astype(int)]
    chosen = np.concatenate([common, thin])
    rng = np.random.default_rng(seed)
    reference = StructureReference.from_frames(cg_map.atoms, train.positions)
    probe = StructureProbe(reference, len(chosen), n_samples)
    columns: dict[str, list[np.ndarray]] = {}
    for done, piece in enumerate(np.array_split(chosen, max(1, len(chosen) // 5)), 1):
        samples = reconstruct(flow, potential, beads[piece], n_samples, rng)
        probe.add(samples.positions, held_out.positions[piece])
        values = {
            "label_variance": label_variance(samples.log_weight, samples.labels),
            "log_weight": samples.log_weight,
        }
        if getattr(cg_map, "kind", None) == "slice":
            values["slice_variance"] = label_variance(samples.log_weight, samples.slice_labels)
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
        progress(min(len(chosen), done * 5), len(chosen))
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    arrays["ess"] = effective_sample_size(arrays["log_weight"], axis=1)
    arrays["pareto_k"] = pareto_k(arrays["log_weight"], axis=1)
    arrays["rare"] = np.concatenate([np.zeros(len(common), bool), np.ones(len(thin), bool)])
    arrays["frame"] = chosen
    frames = held_out[common]
    on_frames = pull_back_frames(flow, frames.positions, frames.energy, frames.forces)
    quality = WeightQuality.from_log_weights(
        arrays["log_weight"][: len(common)], on_frames.log_weight
    )
    structure, coverage = probe.finish(arrays["log_weight"], seed)
    for name, part in (("weight", quality), ("structure", structure), ("coverage", coverage)):
        arrays[f"{name}_table"] = np.array(part.rows(), dtype=str)

    figures: dict[str, Any] = {"calls": len(chosen) * n_samples, "states": len(common)}
    for where, name in ((~arrays["rare"], ""), (arrays["rare"], "_rare")):
        if where.any():
            ess = arrays["ess"][where]
            label = arrays["label_variance"][where]
            figures |= {
                f"ess_mean{name}": float(ess.mean()),
                f"ess_p5{name}": float(np.percentile(ess, 5)),
                f"label_variance_kJ2{name}": float(to_kJ_per_mol(label.mean())),
            }
            if "slice_variance" in arrays:  # forces on bead atoms: slice maps alone have them
                force = arrays["slice_variance"][where]
                figures |= {
                    f"slice_variance_kJ2{name}": float(to_kJ_per_mol(force.mean())),
                    f"variance_ratio{name}": float(force.mean() / label.mean()),
                }
    figures |= {
        "rare_states": len(thin),
        **quality.summary(),
        **coverage.summary(),
        **structure.summary(),
    }
    return arrays, figures

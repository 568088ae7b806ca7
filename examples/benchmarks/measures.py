"""What is measured of a trained flow, on frames held out."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from systems import System

from ccg_ase.torsion_map import TorsionMap
from ccg_ase.units import thermal_energy
from ccg_mda.diagnostics import diagnose
from ccg_mda.flow import Backmapper
from ccg_mda.structure import StructureReference
from ccg_mda.weights import effective_sample_size, log_mean_exp
from ccg_training.estimators import label_variance, to_kJ_per_mol
from ccg_training.reconstruction import reconstruct

PHI_PSI = ((4, 6, 8, 14), (6, 8, 14, 16))  # atoms of alanine dipeptide


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors over their lengths."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def measure(
    system: System, flow: Backmapper, states: np.ndarray, n_samples: int, seed: int
) -> dict[str, float]:
    """Effective sample size and label variance at the states of given frames."""
    coarse = system.cg_map.apply(system.held_out.positions[states])
    rng = np.random.default_rng(seed)
    ess, variance, slices = [], [], []
    for piece in np.array_split(coarse, max(1, len(coarse) // 5)):
        samples = reconstruct(flow, system.potential, piece, n_samples, rng)
        ess.append(effective_sample_size(samples.log_weight, axis=1))
        variance.append(label_variance(samples.log_weight, samples.labels))
        if getattr(system.cg_map, "kind", "") == "slice":
            slices.append(label_variance(samples.log_weight, samples.slice_labels))
    ess = np.concatenate(ess)
    found = {"ess": ess.mean(), "ess_median": np.median(ess), "ess_p5": np.percentile(ess, 5)}
    if slices:
        found["label_variance"] = to_kJ_per_mol(np.concatenate(variance).mean())
        found["variance_ratio"] = np.concatenate(slices).mean() / np.concatenate(variance).mean()
    return {name: float(value) for name, value in found.items()}


def bond_profile(system: System, flow: Backmapper, n_samples: int, seed: int) -> dict[str, float]:
    """Compare F(r) of two beads from ln Z(s) with the histogram of all frames, in kT."""
    frames = np.concatenate([system.data.positions, system.held_out.positions])
    r = np.linalg.norm(np.diff(system.cg_map.apply(frames), axis=1)[:, 0], axis=-1)
    count, edges = np.histogram(r, 8, range=np.percentile(r, [5.0, 95.0]))
    fine = edges[0] + (np.arange(32) + 0.5) * (edges[-1] - edges[0]) / 32  # four in each bin
    beads = np.zeros((len(fine), 2, 3))
    beads[:, 1] = fine[:, None] * unit(np.array([1.0, 2.0, 3.0]))
    samples = reconstruct(flow, system.potential, beads, n_samples, np.random.default_rng(seed))
    log_z, _ = log_mean_exp(samples.log_weight, axis=1)
    density = np.exp(log_z - log_z.max()) * fine**2
    found = -np.log(density.reshape(len(count), 4).mean(1)) + np.log(count)
    found -= np.average(found, weights=count)
    # Frames are 0.1 ps apart and nearly independent in r: the counting error is a lower bound.
    return {
        "profile_max_kT": float(np.abs(found).max()),
        "profile_rms_kT": float(np.sqrt(np.mean(found**2))),
        "profile_counting_error_kT": float((1.0 / np.sqrt(count)).max()),
        "profile_chi2": float((found**2 * count).sum() / (len(count) - 1)),
    }


def bins(system: System, rng: np.random.Generator, width: float) -> np.ndarray:
    """Return one random held-out frame of each populated bin of (φ, ψ)."""
    phi_psi = TorsionMap(system.cg_map.atoms, PHI_PSI)
    angles = np.floor(np.degrees(phi_psi.apply(system.held_out.positions)) / width).astype(int)
    shuffled = rng.permutation(len(angles))
    _, first = np.unique(angles[shuffled], axis=0, return_index=True)
    return shuffled[first]


def inspect(system: System, flow: Backmapper, n_states: int, n_samples: int) -> dict[str, float]:
    """Check the structure of unweighted samples against held-out frames."""
    box = None if system.box is None else np.r_[system.box, 90.0, 90.0, 90.0]
    frames = system.held_out.positions
    reference = StructureReference.from_frames(system.cg_map.atoms, frames, box)
    found = diagnose(
        flow, frames, None, n_states, n_samples, reference=reference, box=box, batch_size=64
    )
    for row in (*found.structure.rows(), *found.coverage.rows()[:12]):
        print("    " + "  ".join(map(str, row)))
    figures = found.structure.summary() | found.coverage.summary()
    for bond in ("C-N", "C-CA", "C-O"):
        if bond in found.structure.bond_types:
            figures[f"sd_ratio_{bond}"] = found.structure.spread_of(bond)
    if system.potential is not None:
        coarse = system.cg_map.apply(frames[:: max(1, len(frames) // n_states)])
        x = flow(torch.from_numpy(coarse)).rsample(rng=np.random.default_rng(0)).detach()
        kt = thermal_energy(system.temperature_K)
        figures["median_energy_above_md_kT"] = (
            float(np.median(system.potential(x.numpy())[0]) - np.median(system.held_out.energy))
            / kt
        )
    if box is not None:
        figures |= orientations(system, flow, 20)
    return figures


def orientations(system: System, flow: Backmapper, n_samples: int) -> dict[str, float]:
    """Check molecules in a box: M x = s, how they are turned, and exchanges of two of them.

    Bond vectors from heavy atom to polar hydrogen have a mean of zero and a second moment of 1/3 if
    no direction is preferred; the largest deviations are given in standard errors.
    """
    atoms, box = system.cg_map.atoms, torch.diag(torch.as_tensor(system.box))
    beads = torch.from_numpy(system.cg_map.apply(system.held_out.positions[:n_samples]))
    q = flow(beads, box=box)
    with torch.no_grad():
        x, log_q = q.rsample_and_log_prob((), np.random.default_rng(0))
    pairs = [
        (i, j) if atoms.elements[j] == "H" else (j, i)
        for i, j in atoms.bonds.tolist()
        if {atoms.elements[i], atoms.elements[j]} == {"O", "H"}
    ]
    heavy, hydrogen = np.array(pairs)[:: len(pairs) // len(system.cg_map.beads)].T
    u = unit((x[:, hydrogen] - x[:, heavy]).numpy()).reshape(-1, 3)
    second = (u[:, :, None] * u[:, None]).mean(0) - np.eye(3) / 3.0
    # Of one component of uniform directions: variances of u, u² and uv are 1/3, 4/45 and 1/15.
    error = np.sqrt(np.where(np.eye(3), 4.0 / 45.0, 1.0 / 15.0) / len(u))
    size = system.cg_map.n_atoms // len(system.cg_map.beads)
    order = np.arange(len(system.cg_map.beads))
    order[[0, -1]] = order[[-1, 0]]
    moved = (order[:, None] * size + np.arange(size)).ravel()
    with torch.no_grad():
        exchanged = flow(beads[:, order], box=box).log_prob(x[:, moved])
    return {
        "map_error_A": float((flow.cg_map.apply(x) - beads).abs().max()),
        "mean_direction_in_errors": float(np.abs(u.mean(0)).max() / np.sqrt(1.0 / 3.0 / len(u))),
        "second_moment_in_errors": float(np.abs(second / error).max()),
        "directions": len(u),
        "exchange_ln_q": float((exchanged - log_q).abs().max()),
    }


def figures(
    system: System, flow: Backmapper, args: argparse.Namespace, seed: int
) -> dict[str, float]:
    """Measure all that a system allows; the same states for the same seed."""
    rng = np.random.default_rng(seed)
    found = {}
    if system.potential is not None:
        chosen = rng.choice(len(system.held_out), args.states, replace=False)
        found |= measure(system, flow, chosen, args.samples, seed)
    if system.cg_map.coarse_shape == (2, 3):
        found |= bond_profile(system, flow, args.samples, seed)
    if not system.name.startswith("alanine"):
        return found | inspect(system, flow, min(args.states, len(system.held_out)), 10)
    each = bins(system, rng, 20.0)
    of_bins = measure(system, flow, each, args.samples // 2, seed)
    return found | {f"bins_{k}": v for k, v in of_bins.items()} | {"bins": len(each)}

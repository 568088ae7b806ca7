"""Every estimator in repetitions at one state: value, error and truth, for tests and a benchmark.

Each function returns {name: (value (n,), error (n,), truth)} of n independent repetitions.
"""

from __future__ import annotations

import numpy as np
from double_well import KT as WELL_KT
from double_well import TEMPERATURE_K as WELL_TEMPERATURE_K
from double_well import DoubleWell, WideBackmapper
from linear_gaussian import GaussianBackmapper, LinearGaussian

from ccg_ase.units import thermal_energy
from ccg_mda.two_level import TwoLevelWeights
from ccg_mda.weights import log_mean_exp, weighted_average
from ccg_training.annealing import AnnealingPath, anneal, tune_path
from ccg_training.estimators import (
    at_temperature,
    mapping_entropy,
    mean_force,
    temperature_derivative,
    thermodynamics,
)
from ccg_training.pseudo_marginal import pseudo_marginal_chains, stored_chain
from ccg_training.reconstruction import reconstruct

REPETITIONS = 100
WARM_K = 310.0
N_STEPS, N_BLOCKS = 300, 15
MOLECULE = LinearGaussian()
WELLS = DoubleWell()
WELL_STATE = np.array([[[0.3, -0.2, 0.5]]])


def _state():
    return MOLECULE.sample_beads(1, np.random.default_rng(1))


def along(vectors):
    """Component of vectors per bead, (..., n_beads, 3), along a fixed direction."""
    direction = np.random.default_rng(3).normal(size=vectors.shape[-2:])
    return (vectors * direction).sum((-1, -2))


def _repeated(path):
    """Path of one state, for its repetitions."""
    return AnnealingPath(path.fractions, np.repeat(path.step_sizes, REPETITIONS, axis=1))


def plain():
    """Plain weights, on the linear-Gaussian molecule; at another temperature by reweighting."""
    state, T = _state(), MOLECULE.temperature_K
    flow = GaussianBackmapper(MOLECULE, shift=0.12, scale=1.05, bend=0.06, stretch=0.03)
    states = np.repeat(state, REPETITIONS, axis=0)
    drawn = reconstruct(flow, MOLECULE, states, 128, np.random.default_rng(2), batch_size=8192)
    here = thermodynamics(drawn.log_weight, drawn.energy, T)
    shifted = at_temperature(drawn.log_weight, drawn.energy, T, WARM_K)
    there = thermodynamics(shifted, drawn.energy, WARM_K)
    entropy, k = MOLECULE.entropy(state), thermal_energy(1.0)
    found = {
        "free energy": (here.free_energy, MOLECULE.free_energy(state)),
        "energy": (here.energy, MOLECULE.mean_energy(state)),
        "entropy": (here.entropy, entropy),
        "mapping entropy": (mapping_entropy(drawn.log_weight, drawn.energy, T), entropy / k),
        "temperature derivative": (
            temperature_derivative(drawn.log_weight, drawn.energy, T),
            (MOLECULE.free_energy(state, T + 0.01) - MOLECULE.free_energy(state, T - 0.01)) / 0.02,
        ),
        "warmer free energy": (there.free_energy, MOLECULE.free_energy(state, WARM_K)),
        "warmer energy": (there.energy, MOLECULE.mean_energy(state, WARM_K)),
        "warmer entropy": (there.entropy, MOLECULE.entropy(state, WARM_K)),
    }
    for name in ("labels", "slice_labels"):
        force = mean_force(drawn.log_weight, along(getattr(drawn, name)))
        found[f"mean force, {name}"] = (force, along(MOLECULE.mean_force(state)))
    return {name: (*estimate, truth[0]) for name, (estimate, truth) in found.items()}


def annealed(resample_below):
    """Annealed importance sampling (0), or sequential Monte Carlo, on the molecule."""
    state = _state()
    flow = GaussianBackmapper(MOLECULE, shift=0.7, scale=1.25, bend=0.1)
    path = tune_path(flow, MOLECULE, state, 64, np.random.default_rng(4))
    samples = anneal(
        flow,
        MOLECULE,
        np.repeat(state, REPETITIONS, axis=0),
        128,
        _repeated(path),
        np.random.default_rng(5),
        resample_below=resample_below,
        batch_size=8192,
    )
    return {
        "ln Z": (*samples.log_partition, MOLECULE.log_partition(state)[0]),
        "energy": (*samples.average(samples.energy), MOLECULE.mean_energy(state)[0]),
        "mean force": (
            *samples.average(along(samples.labels)),
            along(MOLECULE.mean_force(state))[0],
        ),
    }


class BeadRun:
    """Draws of a bead force field that is too soft, with rough estimates of Z(s)."""

    def __init__(self):
        self.molecule = LinearGaussian(n_atoms=4, bead_atoms=(0, 2, 3))
        self.flow = GaussianBackmapper(self.molecule, shift=0.3, bend=0.3, stretch=0.2)
        self.stiffness = 0.8 * self.molecule.schur
        self.rest, self.kT = self.molecule.x0.ravel()[self.molecule.bead_dof], self.molecule.kT()
        self.root = np.linalg.cholesky(self.stiffness / self.kT)
        self.truth = 0.5 * 3 * self.molecule.n_atoms * self.kT  # of E[U|s]: equipartition

    def draw(self, n, rng):
        noise = rng.normal(size=(len(self.rest), n))
        return (self.rest + np.linalg.solve(self.root.T, noise).T).reshape(n, -1, 3)

    def reduced(self, states):
        delta = states.reshape(len(states), -1) - self.rest
        return 0.5 * np.einsum("si,ij,sj->s", delta, self.stiffness, delta) / self.kT

    def samples(self, states, rng):
        return reconstruct(self.flow, self.molecule, states, 2, rng, batch_size=8192)


def block_average(energy):
    """Mean over steps, (n, C), and block errors of each chain."""
    averages = [
        weighted_average(chain, np.zeros(len(chain)), n_blocks=N_BLOCKS) for chain in energy.T
    ]
    return np.array(averages).T


def pseudo_marginal():
    """Metropolis on s with estimates of Z(s) as they come."""
    run, rng = BeadRun(), np.random.default_rng(6)

    def propose(states, rng):
        new = run.draw(len(states), rng)
        return new, run.reduced(new) - run.reduced(states)

    def log_z(states, rng):
        return log_mean_exp(run.samples(states, rng).log_weight, axis=1)[0]

    first = run.molecule.sample_beads(REPETITIONS, rng)
    chains = pseudo_marginal_chains(propose, log_z, first, 20 + N_STEPS, rng)
    energy = run.molecule.mean_energy(chains.states[20:])
    return {"pseudo-marginal chain": (*block_average(energy), run.truth)}


def stored():
    """Metropolis over stored states, and two-level weights, of the same draws."""
    run, rng = BeadRun(), np.random.default_rng(7)
    states = run.draw(REPETITIONS * N_STEPS, rng)
    drawn, F = run.samples(states, rng), run.reduced(states)
    log_z = log_mean_exp(drawn.log_weight, axis=1)[0]
    energy = run.molecule.mean_energy(states)
    chains, weighted = np.empty((N_STEPS, REPETITIONS)), []
    for repeat in range(REPETITIONS):
        part = slice(repeat * N_STEPS, (repeat + 1) * N_STEPS)
        chains[:, repeat] = energy[part][stored_chain(log_z[part], F[part], rng).index]
        bead = np.repeat(np.arange(N_STEPS), 2)
        weights = TwoLevelWeights.combine(drawn.log_weight[part].ravel(), bead, F[part])
        weighted.append(weights.average(drawn.energy[part].ravel(), n_blocks=N_STEPS))
    return {
        "stored chain": (*block_average(chains), run.truth),
        "two-level average": (*np.array(weighted).T, run.truth),
    }


def _well_truth():
    return (
        WELLS.log_partition(WELL_STATE)[0],
        WELLS.mean_energy(WELL_STATE)[0],
        WELLS.mean_force_x(WELL_STATE)[0],
    )


def well_plain():
    """Plain weights, on the double well."""
    states = np.repeat(WELL_STATE, REPETITIONS, axis=0)
    rng = np.random.default_rng(8)
    drawn = reconstruct(WideBackmapper(WELLS), WELLS, states, 600, rng, batch_size=8192)
    arguments = drawn.log_weight, drawn.energy, WELL_TEMPERATURE_K
    result = thermodynamics(*arguments)
    log_z, energy, force = _well_truth()
    return {
        "free energy": (*result.free_energy, -WELL_KT * log_z),
        "energy": (*result.energy, energy),
        "mapping entropy": (*mapping_entropy(*arguments), energy / WELL_KT + log_z),
        "mean force": (*mean_force(drawn.log_weight, drawn.labels[..., 0, 0]), force),
    }


def well_annealed(resample_below):
    """From a flow that has most of its weight in one well."""
    flow = WideBackmapper(WELLS, centre=0.4, width=0.5)
    path = tune_path(flow, WELLS, WELL_STATE, 64, np.random.default_rng(9))
    samples = anneal(
        flow,
        WELLS,
        np.repeat(WELL_STATE, REPETITIONS, axis=0),
        192,
        _repeated(path),
        np.random.default_rng(10),
        resample_below=resample_below,
        batch_size=16384,
    )
    log_z, energy, force = _well_truth()
    return {
        "ln Z": (*samples.log_partition, log_z),
        "energy": (*samples.average(samples.energy), energy),
        "mean force": (*samples.average(samples.labels[..., 0, 0]), force),
    }


CASES = {
    "linear-Gaussian, plain weights": plain,
    "linear-Gaussian, AIS": lambda: annealed(0.0),
    "linear-Gaussian, SMC": lambda: annealed(0.5),
    "bead chains, pseudo-marginal": pseudo_marginal,
    "bead chains, stored": stored,
    "double well, plain weights": well_plain,
    "double well, AIS": lambda: well_annealed(0.0),
    "double well, SMC": lambda: well_annealed(0.5),
}

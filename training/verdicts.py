"""May this model be trusted, and for what: claims, figures, thresholds, verdicts.

A claim is judged by numbers that the run measured itself, beside the noise floor of its sample
sizes. The thresholds are written in the sentence of each verdict.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ccg_ase.units import thermal_energy
from ccg_mda.weights import effective_sample_size

from . import metrics
from .report_data import ReportData

Answer = Literal["yes", "with care", "no", "not measured"]
HIGHEST_FLOOR = 0.02  # nats; a larger noise floor would hide what the thresholds ask for


@dataclass(frozen=True)
class Verdict:
    """One claim, its answer, and the sentence with the numbers behind it."""

    claim: str
    answer: Answer
    reason: str


def judge(data: ReportData) -> list[Verdict]:
    """Judge all claims, in the order of the report."""
    return [judge_one(data) for judge_one in (OVER_TORSIONS if data.by_torsions else CLAIMS)]


def headline(verdicts: list[Verdict]) -> str:
    """Say in one or two sentences what the model is good for."""
    sentences = []
    for answer, start in (
        ("yes", "Trust this model for "),
        ("with care", "Use it with care for "),
        ("no", "Do not use it for "),
        ("not measured", "Not measured: "),
    ):
        claims = [verdict.claim for verdict in verdicts if verdict.answer == answer]
        if claims:
            claims = [claim[0].lower() + claim[1:] for claim in claims]
            text = ", ".join(claims[:-1]) + (" and " if claims[:-1] else "") + claims[-1]
            sentences.append(start + text + ".")
    return " ".join(sentences)


def _unmeasured(claim: str) -> Verdict:
    return Verdict(claim, "not measured", "This run holds no data for it.")


def _beside_populations(
    judge_one: Callable[[ReportData], Verdict],
) -> Callable[[ReportData], Verdict]:
    """Answer "not measured" where the claim needs populations and the reference has none."""

    @functools.wraps(judge_one)
    def judge_if_unbiased(data: ReportData) -> Verdict:
        verdict = judge_one(data)
        if not data.biased:
            return verdict
        return Verdict(
            verdict.claim,
            "not measured",
            "The reference data are biased along the coarse variables: they hold no populations to "
            "compare with.",
        )

    return judge_if_unbiased


def _graded(value: float, good: float, fair: float) -> Answer:
    """Grade a number of which less is better."""
    return "yes" if value <= good else "with care" if value <= fair else "no"


def _free_energy(
    claim: str,
    data: ReportData,
    torsions: np.ndarray,
    log_weights: np.ndarray | None,
    size: float,
) -> Verdict:
    if not torsions.size or not data.torsions_reference.size:
        return _unmeasured(claim)
    known = data.independent_reference or len(data.torsions_reference)
    for bins in (64, 32, 16):  # the finest on which the noise leaves something to see
        reference = metrics.torsion_histogram(data.torsions_reference, bins=bins)
        floor = metrics.jensen_shannon_floor(reference, known, size, rng=np.random.default_rng(0))
        if floor <= HIGHEST_FLOOR:
            break
    model = metrics.torsion_histogram(torsions, log_weights, bins)
    distance = metrics.jensen_shannon(reference, model)
    populated = metrics.free_energy(reference) < 4
    gap = metrics.free_energy_difference(model, reference)[populated]
    rms = float(np.sqrt(np.nanmean(gap**2))) if np.isfinite(gap).any() else np.inf
    good, fair = max(2 * floor, 0.01), max(4 * floor, 0.05)
    answer = _graded(distance, good, fair)
    reason = (
        f"Jensen-Shannon divergence from the reference {distance:.4f} nats; the noise floor of "
        f"{known:.0f} and {size:.0f} independent samples is {floor:.4f} ({bins} bins per torsion; "
        f"yes to {good:.3f}, with care to {fair:.3f}). Free energies below 4 kT differ by "
        f"{rms:.2f} kT (rms); {np.mean(~np.isfinite(gap)):.0%} of those bins were never visited."
    )
    if floor > HIGHEST_FLOOR and answer == "yes":
        return Verdict(claim, "with care", reason + " Too few samples for a firm yes.")
    return Verdict(claim, answer, reason)


@_beside_populations
def _bead_free_energy(data: ReportData) -> Verdict:
    size = data.independent_beads or len(data.torsions_beads)
    return _free_energy("Free energies from bead dynamics", data, data.torsions_beads, None, size)


@_beside_populations
def _atom_free_energy(data: ReportData) -> Verdict:
    claim = "Free energies from reweighted atoms"
    if not data.torsions_atomistic.size or not data.log_weights.size:
        return _unmeasured(claim)
    # Reconstructions of one bead state, and states of one trajectory, say the same again.
    weights = _state_weights(data)
    size = weights.sum() ** 2 / (weights**2).sum()
    size = min(size, data.independent_beads or size)
    return _free_energy(claim, data, data.torsions_atomistic, data.log_weights, size)


def _state_weights(data: ReportData) -> np.ndarray:
    """Sum of the weights of each bead state's reconstructions."""
    weights = np.exp(data.log_weights - data.log_weights.max())
    if not data.atomistic_state.size:
        return weights
    return np.bincount(np.unique(data.atomistic_state, return_inverse=True)[1], weights)


@_beside_populations
def _bead_structure(data: ReportData) -> Verdict:
    claim = "Bead bonds and angles"
    rows = []
    for names, reference, beads in (
        (data.bond_names, data.bonds_reference, data.bonds_beads),
        (data.angle_names, data.angles_reference, data.angles_beads),
    ):
        if reference.size and beads.size:
            width = reference.std(axis=0)
            shift = np.abs(beads.mean(axis=0) - reference.mean(axis=0)) / width
            rows += zip(names, shift, beads.std(axis=0) / width, strict=True)
    if not rows:
        return _unmeasured(claim)
    name, shift, spread = max(rows, key=lambda row: max(row[1], abs(np.log(row[2]))))
    return Verdict(
        claim,
        _graded(max(shift, abs(np.log(spread))), 0.1, 0.3),
        f"Worst of {len(rows)}: {name} is shifted by {shift:.2f} standard deviations and "
        f"{spread:.2f} times as wide as the reference (yes to 0.1 and 10 %, with care to 0.3 and "
        "35 %).",
    )


def _ess(claim: str, data: ReportData, rare: bool) -> Verdict:
    if not data.ess.size or not data.ess_rare.size:
        return _unmeasured(claim)
    last = data.ess_iteration == data.ess_iteration.max()
    values = data.ess[last & (data.ess_rare.astype(bool) == rare)]
    if not len(values):
        return _unmeasured(claim)
    low = float(np.percentile(values, 5))
    where = f" ({data.ess_labels[-1]})" if data.ess_labels else ""
    return Verdict(
        claim,
        _graded(-float(values.mean()), -0.5, -0.1),
        f"Effective sample size per state {values.mean():.2f} on average, {low:.2f} at the "
        f"5th percentile, over {len(values)} states{where} (yes from 0.5, with care from 0.1).",
    )


def _reconstruction(data: ReportData) -> Verdict:
    return _ess("Atoms at common states", data, False)


def _rare_reconstruction(data: ReportData) -> Verdict:
    return _ess("Atoms at rare states", data, True)


@_beside_populations
def _energies(data: ReportData) -> Verdict:
    claim = "All-atom energies after reweighting"
    if (
        not data.energy_reference.size
        or not data.energy_atomistic.size
        or not data.log_weights.size
    ):
        return _unmeasured(claim)
    kT = thermal_energy(data.temperature_K)
    weights = np.exp(data.log_weights - data.log_weights.max())
    usable = np.isfinite(data.energy_atomistic) & (weights > 0)
    weights, energy = weights[usable] / weights[usable].sum(), data.energy_atomistic[usable]
    mean = float(weights @ energy)
    parts = weights * (energy - mean)  # summed per state first: its reconstructions go together
    if data.atomistic_state.size:
        state = np.unique(data.atomistic_state[usable], return_inverse=True)[1]
        parts = np.bincount(state, parts)
    known = data.independent_reference or len(data.energy_reference)
    error = np.hypot(np.sqrt((parts**2).sum()), data.energy_reference.std() / np.sqrt(known))
    gap = mean - float(data.energy_reference.mean())
    raw = float(energy.mean() - data.energy_reference.mean())
    return Verdict(
        claim,
        _graded(abs(gap), max(0.3 * kT, 2 * error), max(kT, 4 * error)),
        f"The mean differs from the reference by {gap / kT:.2f} ± {error / kT:.2f} kT "
        f"({raw / kT:.2f} kT before reweighting; yes to 0.3 kT or two errors, with care to 1 kT "
        f"or four). Effective sample size of the whole ensemble: "
        f"{effective_sample_size(data.log_weights):.3f} of {len(data.log_weights)} frames.",
    )


def _ensemble(data: ReportData) -> Verdict:
    """Judge the ensemble of beads and atoms together, which needs no reference."""
    claim = "The all-atom ensemble after reweighting"
    if not data.log_weights.size:
        return _unmeasured(claim)
    states, whole = _state_weights(data), effective_sample_size(data.log_weights)
    of_states = states.sum() ** 2 / (len(states) * (states**2).sum())
    return Verdict(
        claim,
        _graded(-whole, -0.5, -0.1),
        f"Effective sample size {whole:.2f} of {len(data.log_weights)} reconstructions (yes from "
        f"0.5, with care from 0.1): {of_states:.2f} for the bead states, whose force field decides "
        f"how often each is visited, {whole / of_states:.2f} for the atoms on them.",
    )


def _labels(data: ReportData) -> Verdict:
    claim = "Mean-force labels"
    if not data.label_variance.size:
        return _unmeasured(claim)
    if not data.label_variance_slice.size:
        return Verdict(
            claim,
            "not measured",
            f"Variance {np.mean(data.label_variance):.3g} (eV/Å)² per component. Beads that aren't "
            "atoms have no plain force of their own to compare with.",
        )
    ours, plain = float(np.mean(data.label_variance)), float(np.mean(data.label_variance_slice))
    gain = plain / ours
    return Verdict(
        claim,
        _graded(-gain, -10, -2),
        f"Variance {ours:.3g} (eV/Å)² per component, {gain:.0f} times less than the forces on the "
        f"bead atoms ({plain:.3g}): one label is worth {gain:.0f} of them (yes from 10, with care "
        "from 2).",
    )


def _new_states(data: ReportData) -> Verdict:
    """Judge F at states that the models hadn't learnt from: the last turn's labels."""
    claim = "Free energies at new states"
    errors = data.turn_free_energy_error
    if not errors.size or not np.isfinite(errors[-1]):
        return _unmeasured(claim)
    # States without a label of F are those where it is hardest to know.
    error, accepted = errors[-1], data.turn_accepted[-1]
    answers: list[Answer] = ["yes", "with care", "no"]
    worse = max((_graded(error, 0.3, 1.0), _graded(1 - accepted, 0.1, 0.5)), key=answers.index)
    return Verdict(
        claim,
        worse,
        f"At the states that turn {len(errors)} labelled, F was known to {error:.2f} kT before "
        "(rms, noise of the labels taken off; yes to 0.3 kT, with care to 1 kT). That is where "
        f"there are labels from plain weights, {accepted:.0%} of the states (yes from 90 %, with "
        "care from 50 %).",
    )


def _convergence(data: ReportData) -> Verdict:
    """Judge the loop: "yes" takes targets met at new states, and a held-out check that agrees."""
    claim = "Convergence of the loop"
    if not data.end_of_loop:
        return _unmeasured(claim)
    reason, sentence = data.end_of_loop
    checks = [_reconstruction(data), _rare_reconstruction(data)]
    failed = [check for check in checks if check.answer == "no"]
    if reason != "targets met":
        return Verdict(claim, "no", f"Not converged; the loop ended because {sentence}.")
    if failed or checks[0].answer != "yes":
        doubt = (failed or checks)[0]
        return Verdict(
            claim,
            "with care",
            f"Its targets were met ({sentence}), but the final check doesn't agree: {doubt.claim}. "
            + doubt.reason,
        )
    return Verdict(claim, "yes", f"Converged: {sentence}, and the held-out check agrees.")


CLAIMS: tuple[Callable[[ReportData], Verdict], ...] = (
    _bead_free_energy,
    _bead_structure,
    _reconstruction,
    _rare_reconstruction,
    _atom_free_energy,
    _energies,
    _ensemble,
    _labels,
    _new_states,
    _convergence,
)
OVER_TORSIONS = (_new_states, _reconstruction, _rare_reconstruction, _convergence)

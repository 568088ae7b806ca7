"""The joint fit leads flow and force field to a truth in closed form, and never for the worse."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from free_molecule import FreeMolecule
from linear_gaussian import GaussianBackmapper

from ccg_ase import ForceField
from ccg_ase.energies import bead_energies
from ccg_mda import Backmapper
from ccg_training.buffer import Buffer
from ccg_training.consistency import check_consistency
from ccg_training.figures import residual_histogram
from ccg_training.fine_tuning import fine_tune
from ccg_training.fit_flow import LIKELIHOOD_ONLY, FlowFrames, FlowLoss, fit_flow, mean_nll
from ccg_training.fit_forcefield import FitSettings, fit_force_field
from ccg_training.fit_joint import JointSettings, fit_joint
from ccg_training.labels import Labels
from ccg_training.reconstruction import reconstruct
from ccg_training.reference import ReferenceData, read_npz
from ccg_training.report_data import ReportData
from ccg_training.workspace import Workspace

MOLECULE = FreeMolecule()
KT = MOLECULE.kT()
LABEL_SD = 0.05  # eV/Å


def frames_of(n: int, seed: int) -> FlowFrames:
    rng = np.random.default_rng(seed)
    x = MOLECULE.atoms(MOLECULE.states(n, rng), rng)
    energy, forces = MOLECULE(x)
    return FlowFrames(x, np.ones(n), forces, energy)


def labels_of(n: int, seed: int) -> Labels:
    rng = np.random.default_rng(seed)
    beads = MOLECULE.states(n, rng)
    noise = LABEL_SD * rng.normal(size=beads.shape)
    return Labels(beads, MOLECULE.mean_force(beads) + noise, np.full(n, LABEL_SD**2))


TRAIN, HELD_OUT = frames_of(4000, 0), frames_of(150, 1)
LABELS, HELD_OUT_LABELS = labels_of(1000, 2), labels_of(300, 3)


@pytest.fixture(scope="module")
def models() -> tuple[Backmapper, ForceField]:
    """Return models that have seen a part of the truth only."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Backmapper.from_data(
            MOLECULE.cg_map, 300.0, torch.from_numpy(TRAIN.positions), width=16, hops=4
        )
        force_field = ForceField.from_data(
            MOLECULE.cg_map, 300.0, LABELS.beads, channels=4, n_layers=1
        )
    settings = {"steps": 60, "batch_size": 128, "learning_rate": 4e-3, "seed": 0}
    fit_flow(flow, TRAIN, terms=LIKELIHOOD_ONLY, **settings)
    few = FitSettings(steps=10, batch_size=64, learning_rate=1e-2)
    fit_force_field(force_field, LABELS, HELD_OUT_LABELS, few)
    return flow, force_field


def divergence(flow: Backmapper) -> float:
    """KL(p|q) in nats, by new frames of the exact density."""
    x = torch.from_numpy(frames_of(2000, 4).positions)
    exact = GaussianBackmapper(MOLECULE)(MOLECULE.cg_map.apply(x)).log_prob(x)
    return mean_nll(flow, x.numpy()) + exact.mean().item()


def errors(force_field: ForceField) -> tuple[float, float]:
    """Root-mean-square errors of F (kT, its constant taken off) and of the force (eV/Å)."""
    beads = MOLECULE.states(1000, np.random.default_rng(5))
    energy, force = bead_energies(force_field, beads)
    excess = (energy - MOLECULE.free_energy(beads)) / KT
    return excess.std(), np.sqrt(np.mean((force - MOLECULE.mean_force(beads)) ** 2))


def run(models, frames=TRAIN, labels=LABELS, **settings):
    flow, force_field = copy.deepcopy(models)
    given = JointSettings(**{"batch_size": 64, "learning_rate": 4e-3, "seed": 0} | settings)
    fit = fit_joint(flow, force_field, frames, labels, HELD_OUT, HELD_OUT_LABELS, FlowLoss(), given)
    return flow, force_field, fit


@pytest.fixture(scope="module")
def fitted(models):
    return run(models, steps=120, learning_rate=8e-3)


def test_it_leads_both_models_to_the_closed_form(models, fitted):
    flow, force_field, fit = fitted
    before, after = divergence(models[0]), divergence(flow)
    assert not fit.worse
    assert 0 < after < before / 3
    for wrong, less in zip(errors(models[1]), errors(force_field), strict=True):
        assert less < wrong / 3
    assert fit.after["residual"] < fit.before["residual"] / 5


def same(a, b) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_one_seed_gives_one_result(models):
    gently = {"steps": 4, "learning_rate": 4e-4}
    first, second, other = (run(models, **gently, seed=seed) for seed in (0, 0, 1))
    assert all(same(a, b) for a, b in zip(first[:2], second[:2], strict=True))
    assert first[2] == second[2]
    assert not same(first[0], models[0])
    assert not same(first[1], models[1])
    assert not same(other[0], first[0])


@pytest.mark.parametrize("broken", ["frames", "labels"])
def test_bad_data_leave_the_models_as_they_were(fitted, broken):
    frames, labels = TRAIN, LABELS
    if broken == "frames":
        frames = replace(frames, forces=-3 * frames.forces, energy=-frames.energy)
    else:
        labels = replace(labels, force=-labels.force)
    flow, force_field, fit = run(fitted[:2], frames, labels, steps=20)
    assert fit.worse
    assert "undone" in str(fit)
    assert same(flow, fitted[0])
    assert same(force_field, fitted[1])


def test_a_loss_without_the_residual_is_refused(models):
    with pytest.raises(ValueError, match="no joint residual"):
        fit_joint(*models, TRAIN, LABELS, HELD_OUT, HELD_OUT_LABELS, FlowLoss.named("forces"))


class SmallRun(Workspace):
    """A run directory of this molecule, with what one turn leaves there."""

    def __init__(self, folder: Path, models: tuple[Backmapper, ForceField]) -> None:
        self.directory, self.cg_map, self.temperature_K = folder, MOLECULE.cg_map, 300.0
        self.device = torch.device("cpu")
        sections = {
            "run": {"seed": 0},
            "cycle": {"joint_steps": 3},
            "flow": {"batch_size": 32, "learning_rate": 2e-3, "patience": 5},
            "force_field": {"relative_entropy_rounds": 0},
            "potential": {"forcefield": [], "system": None},
            "system": {"name": "", "topology": Path("free.pdb")},
        }
        self.config = SimpleNamespace(
            **{n: SimpleNamespace(**keys) for n, keys in sections.items()}
        )
        parts = dict(zip(("backmapper", "force_field"), models, strict=True))
        self.save(self.iteration(1) / "model.ccg", parts)
        rng = np.random.default_rng(6)
        samples = reconstruct(models[0], MOLECULE, MOLECULE.states(20, rng), 30, rng)
        samples.save(self.final(1) / "samples.npz")
        labels, state = Labels.from_samples(samples), np.repeat(np.arange(20), 30)
        labels.save(self.iteration(1) / "labels.npz")
        LABELS[:100].save(self.iteration(1) / "frame_labels.npz")
        x, forces = (a.reshape(600, -1, 3) for a in (samples.positions, samples.forces))
        Buffer(
            beads=samples.beads[state],
            positions=x,
            forces=forces,
            energy=samples.energy.ravel(),
            weight=np.ones(600),
            state=state,
            bead_force=labels.force[state],
            free_energy=labels.free_energy[state],
        ).save(self.iteration(1) / "buffer.npz")

    @property
    def data(self) -> tuple[ReferenceData, ReferenceData]:
        return tuple(ReferenceData(f.positions, f.forces, f.energy) for f in (TRAIN, HELD_OUT))


def test_the_stages_leave_models_and_residuals_and_can_be_repeated(models, tmp_path):
    run, stage = SmallRun(tmp_path, models), SimpleNamespace(update=lambda *a, **k: None)
    first = fine_tune(run, stage, 1)
    before, after = (model.states["force_field"] for model in (run.model(1), run.final_model(1)))
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert first["residual_error"] > 0
    # A repeated stage must not begin with its own result.
    assert fine_tune(run, stage, 1) == first
    figures = check_consistency(run, stage, 1)
    stored = read_npz(run.final(1) / "consistency.npz")
    assert stored["forward"].shape == (len(HELD_OUT),)
    assert stored["reverse"].shape == (600,)
    assert figures["forward_rms"] == pytest.approx(np.sqrt(np.mean(stored["forward"] ** 2)))
    data = ReportData(residual_forward=stored["forward"], residual_reverse=stored["reverse"])
    (axes,) = residual_histogram(data).axes
    drawn = [patch.get_data() for patch in axes.patches]
    assert len(drawn) == 2
    for density in drawn:
        assert np.sum(density.values * np.diff(density.edges)) == pytest.approx(1.0)
    assert residual_histogram(ReportData()) is None

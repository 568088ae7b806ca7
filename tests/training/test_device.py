"""Stages on another device than the CPU: a simulated one, whose rules are those of a GPU."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from exact_flows import CHAIN, ExactPotential, flow_of, frames_of, perturbed, structures
from simulated_device import DEVICE, OnDevice, simulated
from typer.testing import CliRunner

from ccg_ase.checkpoint import load_model, save_model
from ccg_ase.devices import available, device_of
from ccg_ase.energies import bead_energies
from ccg_ase.forcefield import ForceField
from ccg_mda import Backmapper
from ccg_mda.bead_sources import bead_universe
from ccg_mda.diagnostics import diagnose
from ccg_mda.parallel_potential import ParallelPotential, usable_cores
from ccg_mda.potential import OpenMMPotential
from ccg_mda.torch_potential import TorchSystemPotential
from ccg_mda.transformation import backmap
from ccg_training.annealing import anneal, tune_path
from ccg_training.cli import app
from ccg_training.config import Config
from ccg_training.fit_flow import FlowLoss, OwnSamples, fit_flow, frame_nll
from ccg_training.fit_forcefield import FitSettings, fit_force_field
from ccg_training.labels import Labels
from ccg_training.langevin_sampler import LangevinSampler
from ccg_training.reconstruction import pull_back_frames, reconstruct
from ccg_training.reference import read_structure
from ccg_training.sampling import ase_bead_dynamics
from ccg_training.system import potential_of

FLOW = flow_of(CHAIN)
BEADS = CHAIN.cg_map.apply(CHAIN.x0) + 0.05 * np.random.default_rng(0).normal(
    size=(40, CHAIN.cg_map.n_beads, 3)
)


@pytest.fixture(scope="module")
def force_field():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ForceField.from_data(
            CHAIN.cg_map, 300.0, BEADS, n_members=2, channels=4, n_layers=1, terms=["bonds"]
        ).double()


@pytest.fixture
def device():
    with simulated() as device:
        yield device


def both(module, device):
    """Return a module's copies on the device and on the CPU."""
    there = copy.deepcopy(module).to(device)
    assert device_of(there) == DEVICE
    return there, copy.deepcopy(module)


def assert_same(found, expected):
    for name, value in vars(expected).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


def assert_same_module(there, here):
    for a, b in zip(there.parameters(), here.parameters(), strict=True):
        assert isinstance(a, OnDevice)
        assert torch.equal(a.cpu(), b)


def test_the_simulation_is_as_strict_as_a_gpu(device):
    there, here = torch.ones(3, device=device), torch.ones(3)
    with pytest.raises(RuntimeError, match="on the CPU"):
        there + here
    with pytest.raises(RuntimeError, match="on the CPU"):
        torch.where(there > 0, there, here)
    with pytest.raises(RuntimeError, match="on the CPU"):
        here[there.long()]
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    assert (2 * there + torch.tensor(1.0)).cpu().tolist() == [3, 3, 3]


def test_labels_of_samples_and_frames(device):
    flows, potential = both(FLOW, device), ExactPotential(FLOW)
    samples = [
        reconstruct(flow, potential, BEADS[:3], 2, np.random.default_rng(1)) for flow in flows
    ]
    assert_same(*samples)
    x, energy, forces = (getattr(samples[1], n)[:, 0] for n in ("positions", "energy", "forces"))
    assert_same(*(pull_back_frames(flow, x, energy, forces) for flow in flows))
    np.testing.assert_array_equal(*(frame_nll(flow, x) for flow in flows))


def test_annealing(device):
    potential, found = ExactPotential(FLOW), []
    for flow in both(FLOW, device):
        path = tune_path(
            flow, potential, BEADS[:2], 4, np.random.default_rng(2), n_leapfrog=1, n_warm_up=1
        )
        found.append(anneal(flow, potential, BEADS[:2], 4, path, np.random.default_rng(3)))
    assert_same(*found)


def test_flow_fit(device):
    target = perturbed(FLOW, 0.05, 7)
    frames = frames_of(target, BEADS, 8)
    terms = FlowLoss(coordinate_force=1.0, log_variance=0.5, reverse_kl=0.1, weighted_kl=0.1)
    flows = both(FLOW, device)
    for flow in flows:
        own = OwnSamples(ExactPotential(target), n_states=2, n_samples=4)
        fit_flow(
            flow,
            frames,
            terms=terms,
            steps=1,
            batch_size=16,
            learning_rate=1e-3,
            seed=0,
            held_out=frames[:10],
            own=own,
        )
    assert_same_module(*flows)
    assert not torch.equal(next(flows[1].parameters()), next(FLOW.parameters()))


def test_force_field_fit_energies_and_dynamics(device, force_field, tmp_path):
    rng = np.random.default_rng(5)
    n, shape = len(BEADS), BEADS.shape
    labels = Labels(BEADS, rng.normal(size=shape), np.ones(n), rng.normal(size=n), np.ones(n))
    settings = FitSettings(steps=2, batch_size=16, evaluate_every=1)
    fields = both(force_field, device)
    for field in fields:
        fit_force_field(field, labels, labels[:10], settings)
    assert_same_module(*fields)
    for found, expected in zip(*(bead_energies(f, BEADS) for f in fields), strict=True):
        np.testing.assert_array_equal(found, expected)
    frames = [
        ase_bead_dynamics(f, BEADS[:2], tmp_path / str(k), n_steps=2, save_every=1)
        for k, f in enumerate(fields)
    ]
    np.testing.assert_array_equal(*frames)
    sample = LangevinSampler(n_steps=2, every=1, equilibration=1, compiled=False)
    np.testing.assert_array_equal(*(sample(f, BEADS[:2], 6) for f in fields))


def test_files_hold_no_device(device, tmp_path):
    there, _ = both(FLOW, device)
    path = tmp_path / "model.ccg"
    save_model(path, cg_map=there.cg_map, temperature_K=300.0, parts={"backmapper": there})
    here = Backmapper.load(path)
    assert device_of(here).type == "cpu"
    loaded = Backmapper.from_model(load_model(path, device=device))
    assert_same_module(loaded, here)
    assert_same_module(loaded, FLOW)


def test_readers_and_checks(device):
    flows, exact = both(FLOW, device), ExactPotential(FLOW)
    universes = [backmap(bead_universe(BEADS[:3], f), f, seed=1, prefetch=3) for f in flows]
    for found, expected in zip(*(u.trajectory for u in universes), strict=True):
        np.testing.assert_array_equal(found.positions, expected.positions)
        assert found.data["log_prob"] == expected.data["log_prob"]
    frames = structures(CHAIN, 30, 2)

    def potential(x):
        energy, forces = exact(x.reshape(-1, *x.shape[-2:]))
        return energy.reshape(x.shape[:-2]), forces.reshape(x.shape)

    found = [diagnose(f, frames, potential, n_states=2, n_samples=30).summary() for f in flows]
    assert found[0] == found[1]


def test_energies(device):
    pdb = Path(__file__).parents[1] / "data" / "alanine_dipeptide.pdb"
    openmm = OpenMMPotential.from_pdb(pdb, ["amber96.xml", "amber96_obc.xml"])
    start = read_structure(pdb).atoms.positions
    x = start + 0.02 * np.random.default_rng(0).normal(size=(5, *start.shape))
    here = TorchSystemPotential.from_system(openmm.system, frames_at_once=4)
    there = TorchSystemPotential.from_system(openmm.system, device=device, frames_at_once=4)
    for found, expected, truth in zip(there(x), here(x), openmm(x), strict=True):
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(found, truth, rtol=1e-8, atol=1e-8)


CONFIG = f"""
[system]
topology = "{Path(__file__).parents[1] / "data" / "alanine_dipeptide.pdb"}"
[mapping]
preset = "backbone"
[run]
directory = "run"
"""


def test_a_missing_gpu_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available("auto") == available("cpu") == torch.device("cpu")
    (tmp_path / "cycle.toml").write_text(CONFIG)
    train = ["train", str(tmp_path / "cycle.toml"), "--device"]
    done = CliRunner().invoke(app, [*train, "cuda:1"])
    assert done.exit_code == 2
    assert "there is no device 'cuda:1'" in done.output
    done = CliRunner().invoke(app, [*train, "abacus"])
    assert done.exit_code == 2
    assert "no device is called 'abacus'" in done.output
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert available("auto") == torch.device("cuda")
    assert available("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="finds 2 GPUs"):
        available("cuda:2")


def test_choice_of_the_potential(tmp_path, monkeypatch):
    (tmp_path / "cycle.toml").write_text(CONFIG)
    config = Config.load(tmp_path / "cycle.toml")

    def chosen(**changes):
        potential = config.potential.model_copy(update=changes)
        return potential_of(config.model_copy(update={"potential": potential}))

    assert chosen().workers == usable_cores()
    assert isinstance(chosen(evaluate="torch"), TorchSystemPotential)
    # Where torch is asked for, it has to do; on a GPU, OpenMM stands in.
    other = ["amber14/protein.ff14SB.xml", "implicit/gbn2.xml"]
    with pytest.raises(NotImplementedError, match="isn't available in torch"):
        chosen(evaluate="torch", forcefield=other)
    monkeypatch.setattr("ccg_training.system.available", lambda _: DEVICE)
    with pytest.warns(UserWarning, match="energies come from OpenMM on the CPU"):
        assert isinstance(chosen(forcefield=other), ParallelPotential)
    with simulated():
        assert chosen().device == DEVICE
    assert isinstance(chosen(evaluate="openmm"), ParallelPotential)

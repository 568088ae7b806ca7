"""Beads in torch-sim: its contract for models, and the ensemble that its Langevin dynamics samples.

torch-sim's own `validate_model_outputs` feeds silicon and iron; what it checks of the outputs is
checked here on beads.
"""

import builtins
import functools
import importlib
import sys
import warnings

import numpy as np
import pytest
import torch

from ccg_ase import BatchedLangevin, CGCalculator, CGMap, ForceField, Topology
from ccg_ase.evaluator import Evaluation

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch-sim's own use of torch.jit
    ts = pytest.importorskip("torch_sim", reason='needs pip install "ccg[torchsim]"')
    from ccg_ase import torch_sim_model
    from ccg_ase.torch_sim_model import BeadModel

CPU = torch.device("cpu")


@pytest.fixture
def model(force_field):
    return BeadModel(force_field, dtype=torch.float64, compiled=False)


def state_of(model, frames, cell=None):
    systems = [model.cg_map.to_ase(beads) for beads in frames]
    for beads in systems:
        if cell is not None:
            beads.set_cell(cell)
            beads.pbc = True
    return ts.io.atoms_to_state(systems, CPU, model.dtype)


def test_contract_for_models(model, ala2_beads):
    assert isinstance(model, ts.models.interface.ModelInterface)
    state = state_of(model, ala2_beads[:3])
    before = state.clone()
    output = model(state)
    for name in ("positions", "cell", "system_idx", "atomic_numbers", "masses"):
        assert torch.equal(getattr(state, name), getattr(before, name)), name
    assert output["energy"].shape == (3,)
    assert output["forces"].shape == (15, 3)
    assert set(output) == {"energy", "forces"}
    assert all(value.dtype == torch.float64 for value in output.values())
    assert not any(value.requires_grad for value in output.values())
    for k in range(3):
        alone = model(state_of(model, ala2_beads[k : k + 1]))
        assert alone["energy"].shape == (1,)
        torch.testing.assert_close(alone["energy"][0], output["energy"][k])
        torch.testing.assert_close(alone["forces"], output["forces"][5 * k : 5 * k + 5])


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_equal_to_the_calculator(force_field, ala2_beads, dtype, atol):
    model = BeadModel(force_field, dtype=dtype, compiled=False)
    state = state_of(model, ala2_beads[:4])
    output = model(state)
    assert output["forces"].dtype == model.dtype == dtype
    beads = state.positions.double().numpy().reshape(4, 5, 3)  # as rounded by torch-sim
    atoms = CGCalculator(force_field, dtype=torch.float64, replicas=4, compiled=False).atoms(beads)
    energies = atoms.get_potential_energies().reshape(4, 5).sum(1)
    np.testing.assert_allclose(output["energy"], energies, atol=atol)
    np.testing.assert_allclose(output["forces"], atoms.get_forces(), atol=atol)


def test_one_bead_is_not_squeezed(monkeypatch):
    topology = Topology(names=("A",), masses=[1.0])

    class Well:
        cg_map, temperature_K, replicas = CGMap.from_slices(topology, [0]), 300.0, 1

        def __init__(self, *_, **__):
            pass

        def __call__(self, beads, box):
            return Evaluation((beads**2).sum(-1), -2 * beads, None)

    monkeypatch.setattr(torch_sim_model, "Evaluator", Well)
    model = BeadModel(None, dtype=torch.float64)
    output = model(state_of(model, np.ones((1, 1, 3))))
    assert output["energy"].tolist() == [3.0]
    assert output["forces"].tolist() == [[-2.0] * 3]


def test_langevin_samples_what_batched_langevin_samples(ala2_map, ala2_prior, ala2_beads):
    """Same mean and spread of the bonds, within four standard errors."""
    field = ForceField(ala2_map, 300.0, ala2_prior, channels=1, n_layers=1, l_max=0)
    model = BeadModel(field, dtype=torch.float64, compiled=False)
    start = ala2_beads[:64]
    sampler = BatchedLangevin(field, timestep_fs=2, friction_per_ps=20, seed=1, compiled=False)
    sampler.run(start, 200)
    expected = sampler.run(None, 600, every=5).beads

    units = ts.units.MetalUnits
    kT, dt = (torch.tensor(x, dtype=torch.float64) for x in (300 * units.temperature, 2e-3))
    settings = {"kT": kT, "dt": dt * units.time, "gamma": torch.tensor(20 / units.time)}
    state, nvt = state_of(model, start), ts.integrators.nvt
    if hasattr(nvt, "nvt_langevin_init"):
        state.rng = 1
        state = nvt.nvt_langevin_init(state, model, kT=kT)
        step = functools.partial(nvt.nvt_langevin_step, model=model, **settings)
    else:  # torch-sim 0.3
        initialize, step = nvt.nvt_langevin(model, **settings, seed=1)
        state = initialize(state)
    frames = []
    for k in range(800):
        state = step(state)
        if k >= 200 and k % 5 == 0:
            frames.append(state.positions.reshape(64, 5, 3).numpy().copy())
    bonds = [np.linalg.norm(np.diff(x, axis=2), axis=-1) for x in (np.array(frames), expected)]
    centre = bonds[1].mean((0, 1))
    for statistic in (lambda x: x.mean(0), lambda x: ((x - centre) ** 2).mean(0)):
        ours, theirs = map(statistic, bonds)
        error = np.sqrt((ours.var(0) + theirs.var(0)) / 64)
        assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()
        assert (error < 0.1 * theirs.mean(0)).all()


def test_integrate_and_its_autobatcher(force_field, ala2_beads):
    """The one call that users make; batches of another size need another evaluator."""
    model = BeadModel(force_field, compiled=False)
    systems = [model.cg_map.to_ase(beads) for beads in ala2_beads[:5]]
    final = ts.integrate(
        systems,
        model,
        integrator=getattr(ts, "Integrator", ts.integrators).nvt_langevin,
        n_steps=4,
        temperature=model.temperature_K,
        timestep=0.002,
        autobatcher=ts.BinningAutoBatcher(
            model,
            memory_scales_with=model.memory_scales_with,
            max_memory_scaler=10,  # two systems at a time
        ),
    )
    assert final.positions.shape == (25, 3)
    moved = np.abs(final.positions.numpy().reshape(5, 5, 3) - ala2_beads[:5])
    assert 0 < moved.max() < 0.5
    np.testing.assert_allclose(final.masses.reshape(5, 5)[3], model.cg_map.beads.masses, rtol=1e-6)


# --- periodic boxes ---------------------------------------------------------------------------


class Lattice:
    """Stands in for the Evaluator: an energy of the box and of fractional positions alone."""

    temperature_K = 300.0

    def __init__(self, force_field, replicas, **_):
        self.force_field, self.replicas, self.cg_map = force_field, replicas, force_field.cg_map

    def __call__(self, beads, box):
        x = beads.requires_grad_()
        strain = torch.zeros(len(x), 3, 3, dtype=x.dtype, requires_grad=True)
        cell = box + box @ strain
        phases = 2 * torch.pi * ((x + x @ strain) @ torch.linalg.inv(cell))
        sites = (1 - torch.cos(phases)).sum(-1) + torch.linalg.det(cell)[:, None] / 1e3
        gradient, virial = torch.autograd.grad(sites.sum(), (x, strain))
        stress = virial / torch.linalg.det(box)[:, None, None]
        return Evaluation(sites.detach(), -gradient, stress.detach())


def test_box_reaches_the_evaluator_as_rows(monkeypatch, force_field, ala2_beads):
    """torch-sim keeps cells as columns: a transposed one would break lattice translation."""
    monkeypatch.setattr(torch_sim_model, "Evaluator", Lattice)
    model = BeadModel(force_field, dtype=torch.float64, compute_stress=True)
    cell = np.array([[20.0, 0, 0], [6.0, 18.0, 0], [-4.0, 5.0, 22.0]])
    state = state_of(model, ala2_beads[:2], cell)
    output = model(state)
    assert output["stress"].shape == (2, 3, 3)
    moved = state.clone()
    moved.positions[0] += 3 * torch.from_numpy(cell[2])
    again = model(moved)
    for key, value in output.items():
        torch.testing.assert_close(again[key], value)
    per_system = torch.linalg.det(torch.from_numpy(cell)) / 1e3 * 5
    assert (output["energy"] > per_system).all()
    model.compute_stress = False
    assert set(model(state)) == {"energy", "forces"}


# --- refusals ---------------------------------------------------------------------------------


def test_refuses_other_systems(model, ala2_beads):
    state = state_of(model, ala2_beads[:2])
    state.system_idx = torch.tensor([0] * 4 + [1] * 6)
    with pytest.raises(ValueError, match="the 5 beads of this model, but system 0 has 4 sites"):
        model(state)
    state = state_of(model, ala2_beads[:1])
    state.atomic_numbers += 6
    with pytest.raises(ValueError, match="these are atoms"):
        model(state)
    model.compute_stress = True
    with pytest.raises(ValueError, match="stress needs periodic systems"):
        model(state_of(model, ala2_beads[:1]))


def test_stops_where_the_energy_is_no_number(model, ala2_beads):
    beads = ala2_beads[:3].copy()
    beads[1, 2] = np.nan
    with pytest.raises(FloatingPointError, match="system 1 is NaN"):
        model(state_of(model, beads))


def test_says_how_to_get_torch_sim(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("torch_sim"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "ccg_ase.torch_sim_model")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "ccg\[torchsim\]"'):
        importlib.import_module("ccg_ase.torch_sim_model")

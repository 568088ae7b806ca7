import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ccg_ase import (
    CGCalculator,
    ForceField,
    ModelFileError,
    TorsionMap,
    load_model,
    save_model,
)
from ccg_ase.checkpoint import VERSION


@pytest.fixture
def saved(tmp_path, force_field):
    path = tmp_path / "model.ccg"
    save_model(
        path,
        cg_map=force_field.cg_map,
        temperature_K=300.0,
        parts={"force_field": force_field},
        provenance={"made": "by a test"},
        metrics={"loss": 0.5},
    )
    return path


def rewrite(path, change):
    """Write the file again with another JSON header."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["ccg"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, metadata={"ccg": json.dumps(header)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(tmp_path, force_field, ala2_beads, dtype):
    path = tmp_path / "model.ccg"
    force_field.to(dtype)
    save_model(
        path, cg_map=force_field.cg_map, temperature_K=300.0, parts={"force_field": force_field}
    )
    model = load_model(path)
    assert model.cg_map == force_field.cg_map
    assert (model.temperature_K, model.version) == (300.0, VERSION)
    copy = ForceField.from_model(model)
    assert copy.dtype == dtype
    x = torch.from_numpy(ala2_beads[:3])
    assert torch.equal(copy(x), force_field(x))
    assert torch.equal(copy.reference_beads, force_field.reference_beads)


def test_records_and_metadata(saved):
    model = load_model(saved)
    assert model.provenance == {"made": "by a test"}
    assert model.metrics == {"loss": 0.5}
    assert os.listdir(saved.parent) == [saved.name]  # no temporary left behind


def test_calculator_loads(saved, force_field, ala2_beads):
    atoms = CGCalculator.load(saved, dtype=torch.float64, compiled=False).atoms()
    np.testing.assert_allclose(atoms.positions, ala2_beads[0], rtol=1e-6)
    energy = force_field(force_field.reference_beads).item()
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-12)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated(saved, keep):
    content = saved.read_bytes()
    saved.write_bytes(content[:keep])
    with pytest.raises(ModelFileError, match="truncated or of another format"):
        load_model(saved)


def test_foreign_files(tmp_path):
    path = tmp_path / "foreign.ccg"
    path.write_bytes(b"PK\x03\x04 not a model at all" * 10)
    with pytest.raises(ModelFileError, match="another format"):
        load_model(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ModelFileError, match="not a ccg model"):
        load_model(path)
    save_file({"x": torch.zeros(2)}, path, metadata={"ccg": "not json"})
    with pytest.raises(ModelFileError, match="not a ccg model"):
        load_model(path)
    save_file({}, path, metadata={"ccg": json.dumps({"format": "other", "version": 1})})
    with pytest.raises(ModelFileError, match="not a ccg model"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match="no model file"):
        load_model(tmp_path / "nothing.ccg")


def test_versions(saved):
    rewrite(saved, lambda header, _: header.update(version=VERSION + 1))
    with pytest.raises(ModelFileError, match="upgrade ccg"):
        load_model(saved)
    rewrite(saved, lambda header, _: header.update(version=0))
    with pytest.raises(ModelFileError, match="version 0; the first is 1"):
        load_model(saved)


def test_version_1_keeps_its_force_field_and_says_what_to_do_about_the_rest():
    """The file holds the energy and forces that the code of its time gave."""
    model = load_model(Path(__file__).parents[1] / "data" / "version_1.ccg")
    assert model.version == 1
    force_field = ForceField.from_model(model).double()
    energy, forces = force_field.energy_and_forces(force_field.reference_beads[None])
    assert energy.item() == pytest.approx(model.provenance["energy_eV"], abs=1e-12)
    np.testing.assert_allclose(
        forces[0].detach(), model.provenance["forces_eV_per_A"], rtol=0, atol=1e-11
    )
    with pytest.raises(ModelFileError, match=r"'backmapper'.*before model format 2.*retrain"):
        model.restore("backmapper", ForceField)


@pytest.mark.parametrize(
    ("version", "temperature_K", "terms"), [(2, 310.15, [5, 5, 3, 2]), (3, 300.0, [3, 2, 1, 10])]
)
def test_older_versions_have_the_energies_that_their_code_gave(version, temperature_K, terms):
    """Version 2: one network, priors by bead. Version 3: volumes of beads far apart only."""
    model = load_model(Path(__file__).parents[1] / "data" / f"version_{version}.ccg")
    force_field = ForceField.from_model(model)
    assert (model.version, force_field.dtype) == (version, torch.float32)
    assert force_field.temperatures_K == (temperature_K, temperature_K)
    assert (force_field.n_members, force_field.periodic) == (1, False)
    (molecule,) = force_field.config["prior"]["molecules"]
    volumes = force_field.config["prior"]["volumes"]
    found = [len(molecule[kind]) for kind in ("bonds", "angles", "dihedrals")]
    assert [*found, len(volumes)] == terms
    assert {row[2] for row in volumes} == {0}
    record = model.provenance
    x = torch.tensor(record["beads_A"], dtype=torch.float64)
    energy, forces = force_field.double().energy_and_forces(x)
    assert force_field.prior.volumes(x, force_field.graph.edges(x)).sum(1).max() > 0.01
    np.testing.assert_allclose(energy, record["energies_eV"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(forces, record["forces_eV_per_A"], rtol=0, atol=1e-10)


def test_a_map_to_torsions(tmp_path, ala2_topology):
    torsions = TorsionMap(ala2_topology, [[4, 6, 8, 14], [6, 8, 14, 16]], ("phi", "psi"))
    save_model(tmp_path / "torsions.ccg", cg_map=torsions, temperature_K=300.0, parts={})
    model = load_model(tmp_path / "torsions.ccg")
    assert model.cg_map == torsions
    with pytest.raises(ModelFileError, match="no 'force_field'"):
        ForceField.from_model(model)


def test_parts(saved, force_field):
    model = load_model(saved)
    with pytest.raises(ModelFileError, match=r"no 'backmapper'.*force_field"):
        model.restore("backmapper", ForceField)
    model.states["force_field"].pop("scale")
    with pytest.raises(ModelFileError, match="don't fit"):
        ForceField.from_model(model)
    rewrite(saved, lambda _, tensors: tensors.update({"stranger/x": torch.zeros(1)}))
    with pytest.raises(ModelFileError, match="unknown part 'stranger'"):
        load_model(saved)


def test_failed_save_keeps_the_old_file(saved, force_field):
    before = saved.read_bytes()
    arguments = {"cg_map": force_field.cg_map, "temperature_K": 300.0}
    with pytest.raises(ValueError, match="JSON-able"):
        save_model(saved, **arguments, parts={}, metrics={"x": np.zeros(2)})
    with pytest.raises(ValueError, match="has no `config`"):
        save_model(saved, **arguments, parts={"network": torch.nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="identifier"):
        save_model(saved, **arguments, parts={"a/b": force_field})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]

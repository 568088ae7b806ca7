"""Data from one structure: what hot dynamics changed for good is left out; biased data say so."""

from pathlib import Path

import numpy as np
import pytest

from ccg_mda.potential import OpenMMPotential
from ccg_training.config import Config, ConfigError
from ccg_training.data_check import check
from ccg_training.isomers import isomerised, mirrored
from ccg_training.reference import (
    ReferenceDataError,
    read_npz,
    reference_data,
    trajectory_of,
)
from ccg_training.starting import data_from_structure
from ccg_training.system import mapping_of, potential_of
from tests.harmonic_system import harmonic_system
from tests.linear_gaussian import LinearGaussian

EXAMPLE = Path(__file__).parents[2] / "examples" / "alanine_dipeptide"

OMEGA, PHI = (1, 4, 6, 8), (4, 6, 8, 14)  # with CH3-C-N-CA a peptide bond
SOURCE = """
source = "structure"
hot_time_ps = 2.4
n_states = 20
restrained_ps = 0.08
relaxation_ps = 0.02
save_every_fs = 20.0
walkers = 1
"""


def example(folder, reference):
    text = (EXAMPLE / "cycle.toml").read_text().split("[reference]")[0]
    text = text.replace("alanine_dipeptide.pdb", str(EXAMPLE / "alanine_dipeptide.pdb"))
    (folder / "cycle.toml").write_text(f"{text}[reference]{reference}")
    return Config.load(folder / "cycle.toml")


def twisted(positions, topology, quadruple, degrees):
    """Turn the atoms behind the middle bond of four by an angle."""
    _, j, k, _ = quadruple
    behind, todo = {k}, [k]
    while todo:
        new = {n for n in topology.neighbours()[todo.pop()] if n != j} - behind
        behind |= new
        todo += new
    axis = positions[k] - positions[j]
    axis = axis / np.linalg.norm(axis)
    arm, c, s = positions - positions[k], *(f(np.deg2rad(degrees)) for f in (np.cos, np.sin))
    turned = arm * c + np.cross(axis, arm) * s + np.outer(arm @ axis, axis) * (1 - c)
    return (
        np.where(np.isin(np.arange(len(positions)), list(behind))[:, None], turned, arm)
        + (positions[k])
    )


def test_mirror_images_and_turned_peptide_bonds_are_found(ala2_topology, ala2_positions):
    start = ala2_positions
    other_hand = start.copy()
    other_hand[[9, 10]] = start[[10, 9]]  # HA and CB change places; methyl hydrogens have no hand
    methyl = start.copy()
    methyl[[11, 12]] = start[[12, 11]]
    assert mirrored(ala2_topology, start, np.stack([start, other_hand, methyl])).tolist() == [
        False, True, False,
    ]  # fmt: skip

    cis = twisted(start, ala2_topology, OMEGA, 180)
    phi = twisted(start, ala2_topology, PHI, 120)
    frames = np.repeat(np.stack([start, phi, cis, start]), [30, 30, 30, 10], axis=0)
    walker = np.repeat([0, 1], 50)

    def changed(interval_ps, hot_K=900.0):
        return isomerised(
            ala2_topology, start, frames, walker,
            interval_ps=interval_ps, hot_K=hot_K, temperature_K=300.0,
        )  # fmt: skip

    # Three turns in 100 ps at 900 K: a barrier far too high at 300 K.
    np.testing.assert_array_equal(changed(1.0), np.repeat([False, True, False], [60, 30, 10]))
    # Three turns in 0.1 ps are a bond that turns freely, and so are as many at 300 K in 100 ps.
    assert not changed(0.001).any()
    assert not changed(1.0, hot_K=300.0).any()


def test_frames_have_the_temperature_asked_for_not_that_of_the_hot_dynamics(tmp_path):
    molecule = LinearGaussian(seed=2)
    data, calls = data_from_structure(
        OpenMMPotential(harmonic_system(molecule)), molecule.cg_map, molecule.x0, 300.0, tmp_path,
        hot_temperature_K=900.0, hot_time_ps=20.0, n_states=40, restrained_ps=1.5, walkers=1,
    )  # fmt: skip
    assert calls == 20_000 + 200 + 40 * (1000 + 1500 + 15)
    flat = (data.positions - molecule.x0).reshape(len(data), -1)
    mean = flat[:, molecule.bead_dof] @ molecule.response.T
    rest = flat[:, molecule.rest_dof] - mean
    squared = np.einsum("fi,ij,fj->f", rest, molecule.K_rr, rest) / molecule.n_rest_dof
    by_state = squared.reshape(40, 15).mean(1) / molecule.kT(300.0)
    error = by_state.std(ddof=1) / np.sqrt(40)
    assert error < 0.05
    assert by_state.mean() == pytest.approx(1, abs=3.5 * error)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a configuration, its data, and what the progress said."""
    folder, seen = tmp_path_factory.mktemp("structure"), []
    config = example(folder, SOURCE)
    return config, reference_data(config, folder, lambda *done: seen.append(done)), seen


def test_data_from_a_structure_are_biased_and_cost_what_they_say(made, tmp_path):
    config, data, seen = made
    assert config.reference.biased
    assert data.biased
    assert data.positions.shape == (20 * 4, 22, 3)
    np.testing.assert_array_equal(data.walker, np.repeat(np.arange(20), 4))
    assert seen[-1][0] == seen[-1][1]
    potential, cg_map = potential_of(config), mapping_of(config)
    energy, forces = potential(data.positions)
    np.testing.assert_allclose(data.energy, energy, atol=1e-9)
    np.testing.assert_allclose(data.forces, forces, atol=1e-9)
    folder = config.run.directory.parents[1]
    # 2.4 ps of hot dynamics and 20 states of 0.1 ps, a femtosecond a step, and the stored frames.
    assert read_npz(folder / "reference.npz")["calls"] == 2400 + 120 + 20 * (100 + 4)
    assert not (folder / "reference").exists()
    # Whole states are held out, and equipartition, which the restraint takes part in, isn't asked.
    train, held_out = data.split(0.1)
    assert not set(train.walker) & set(held_out.walker)
    assert len(held_out) == 8
    assert train.biased
    titles = [finding.title for finding in check(data, cg_map, 300.0, potential)]
    assert "potential" in titles
    assert "forces fit the temperature" not in titles
    # The file remembers its bias wherever it goes.
    files = f'\nsource = "trajectory"\nfiles = ["{folder / "reference.npz"}"]\n'
    with pytest.raises(ReferenceDataError, match="set biased = true"):
        trajectory_of(example(tmp_path, files))
    assert trajectory_of(example(tmp_path, files + "biased = true\n")).biased


def test_an_interrupted_start_goes_on_to_the_same_bits(made, tmp_path):
    config, data, _ = made

    def tick(done, total):
        if done >= 0.8 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference_data(config, tmp_path, tick)
    assert len(list((tmp_path / "reference" / "restrained").iterdir())) in range(1, 5)
    resumed = reference_data(config, tmp_path)
    np.testing.assert_array_equal(resumed.positions, data.positions)
    folder = config.run.directory.parents[1]
    calls = [read_npz(at / "reference.npz")["calls"] for at in (folder, tmp_path)]
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ('\nsource = "structure"\nhot_time_ps = 1.0\n', "fewer frames than n_states = 300"),
        ('\nsource = "structure"\nn_states = 3\n', "greater than or equal to 20"),
        ("\nbiased = true\n", 'needs source = "trajectory"'),
        (
            '\nsource = "structure"\n[force_field]\nrelative_entropy_rounds = 2\n',
            r"cycle.toml: relative_entropy_rounds .* set relative_entropy_rounds = 0",
        ),
    ],
)
def test_errors_of_the_configuration(tmp_path, reference, message):
    with pytest.raises(ConfigError, match=message):
        example(tmp_path, reference)

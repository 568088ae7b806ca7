import ase.io
import numpy as np
import pytest
import torch
from wells import Wells

from ccg_ase import AseBeadWriter, BatchedLangevin

SETTINGS = {
    "timestep_fs": 2.0,
    "friction_per_ps": 5.0,
    "seed": 1,
    "dtype": torch.float64,
    "temperatures_K": [300.0, 500.0],
    "exchange_every": 4,
    "box": 9.0 * np.eye(3),
}


@pytest.mark.parametrize("suffix", [".extxyz", ".traj"])
def test_files_hold_the_frames(tmp_path, suffix):
    """Two ladders' lowest rungs in one file, in two runs: read back, frame by frame."""
    path = tmp_path / f"run{suffix}"
    start = np.zeros((4, 2, 3))
    frames = BatchedLangevin(Wells(4), **SETTINGS).run(start, 300, every=20)
    sampler = BatchedLangevin(Wells(4), **SETTINGS)
    with AseBeadWriter(path, sampler.cg_map, replicas=(0, 2)) as writer:
        sampler.write([writer], start, 200, every=20)
    with AseBeadWriter(path, sampler.cg_map, replicas=(0, 2), append=True) as writer:
        sampler.write([writer], None, 100, every=20)
    read = ase.io.read(path, ":")
    assert len(read) == 30
    for k, atoms in enumerate(read):
        frame, replica = k // 2, k % 2 * 2
        np.testing.assert_allclose(atoms.positions, frames.beads[frame, replica], atol=1e-7)
        assert atoms.info["step"] == 20 * (frame + 1)
        assert atoms.info["time_fs"] == 40.0 * (frame + 1)
        assert atoms.info["replica"] == replica
        assert atoms.info["walker"] == frames.walkers[frame, replica]
        assert atoms.info["temperature_K"] == 300.0
        assert atoms.info["cg_map"] == sampler.cg_map.fingerprint()
        assert atoms.get_potential_energy() == pytest.approx(frames.energies[frame, replica])
        np.testing.assert_array_equal(atoms.get_masses(), [12, 40])
        np.testing.assert_array_equal(atoms.cell, 9.0 * np.eye(3))
        assert atoms.pbc.all()


def test_open_writers_stay_open(tmp_path):
    sampler = BatchedLangevin(Wells(4), **SETTINGS)
    with ase.io.Trajectory(tmp_path / "run.traj", "w") as target:
        with AseBeadWriter(target, sampler.cg_map) as writer:
            sampler.write([writer], np.zeros((4, 2, 3)), 4, every=2)
        target.write(sampler.cg_map.to_ase(np.ones((2, 3))))
    assert len(ase.io.read(tmp_path / "run.traj", ":")) == 3


def test_refuses_other_formats(tmp_path):
    with pytest.raises(ValueError, match="no writer for"):
        AseBeadWriter(tmp_path / "run.dcd", Wells(1).cg_map)
    assert not list(tmp_path.iterdir())

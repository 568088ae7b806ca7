"""The calculator behind a socket (i-PI's protocol): what the driver gets is what the client has."""

import shutil
import subprocess
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import units
from ase.calculators.socketio import SocketClient, SocketIOCalculator
from ase.io import write
from ase.md.verlet import VelocityVerlet

from ccg_ase import CGCalculator

INPUTS = Path(__file__).parents[2] / "examples" / "engines"


def served(atoms, name, log):
    """Serve in a thread; every evaluation goes into `log`."""

    def serve():
        for _ in SocketClient(unixsocket=name, timeout=30).irun(atoms):
            log.append((atoms.positions.copy(), atoms.get_potential_energy(), atoms.get_forces()))

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize("replicas", [1, 3])
def test_ase_drives_the_same_dynamics(force_field, ala2_beads, replicas):
    """Twenty steps with and without the socket; its only loss is the conversion to Hartree."""
    calculator = CGCalculator(force_field, dtype=torch.float64, replicas=replicas, compiled=False)
    start = ala2_beads[:replicas].reshape(replicas, 5, 3)
    direct = calculator.atoms(start)
    VelocityVerlet(direct, 2 * units.fs).run(20)

    name, log = f"ccg_{uuid.uuid4().hex}", []
    atoms = direct.copy()
    atoms.positions = start.reshape(-1, 3)
    atoms.set_momenta(np.zeros_like(atoms.positions))
    atoms.cell = [100, 100, 100]  # drivers send a cell even of a free molecule
    # The driver's Atoms are plain: beads have no meaning to it.
    with SocketIOCalculator(unixsocket=name, timeout=30) as atoms.calc:
        client = served(calculator.atoms(start), name, log)
        VelocityVerlet(atoms, 2 * units.fs).run(20)
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    client.join(30)
    assert not client.is_alive()
    assert len(log) == 21  # one evaluation per step
    np.testing.assert_allclose(atoms.positions, direct.positions, atol=1e-9)
    assert energy == pytest.approx(log[-1][1], abs=1e-12)
    np.testing.assert_allclose(forces, log[-1][2], atol=1e-12)
    np.testing.assert_allclose(forces, direct.get_forces(), atol=1e-7)
    assert np.abs(atoms.positions - start.reshape(-1, 3)).max() > 1e-3


@pytest.mark.skipif(shutil.which("i-pi") is None, reason="needs pip install ipi")
def test_ipi_drives(force_field, ala2_beads, tmp_path):
    """i-PI's energies are those of its positions, and its conserved quantity stays."""
    name, log = f"ccg_{uuid.uuid4().hex}", []
    text = (INPUTS / "ipi_beads.xml").read_text().replace("ccg_beads", name)
    (tmp_path / "input.xml").write_text(text)
    atoms = CGCalculator(force_field, dtype=torch.float64, compiled=False).atoms(ala2_beads[0])
    write(tmp_path / "beads.xyz", atoms, format="xyz")
    with subprocess.Popen(["i-pi", "input.xml"], cwd=tmp_path, stdout=subprocess.DEVNULL) as ipi:
        while not Path(f"/tmp/ipi_{name}").exists():
            assert ipi.poll() is None
            time.sleep(0.1)
        client = served(atoms, name, log)
        assert ipi.wait(60) == 0
        client.join(30)
    conserved, _, potential = np.loadtxt(tmp_path / "ipi.out")[:, 2:].T
    assert len(potential) == 101
    np.testing.assert_allclose(potential, [energy for _, energy, _ in log][:101], atol=1e-6)
    assert np.ptp(conserved) < 0.02

"""Another program drives the beads and asks ccg for forces, over i-PI's socket protocol.

i-PI drives if it is installed (pip install ipi), or else ASE. Output goes to the current folder.

Usage: python ipi_socket.py [INPUT.xml]
"""

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from ase import units
from ase.calculators.socketio import SocketClient, SocketIOCalculator
from ase.io import write
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.velocitydistribution import thermalize_momenta

from ccg_ase import CGCalculator

folder = Path(__file__).parent
script = sys.argv[1] if len(sys.argv) > 1 else folder / "ipi_beads.xml"
model = folder.parent / "alanine_dipeptide" / "alanine_dipeptide.ccg"
SOCKET = "ccg_beads"  # the file /tmp/ipi_ccg_beads

calculator = CGCalculator.load(model)
atoms = calculator.atoms()
T = calculator.temperature_K


def serve() -> None:
    """Answer with energies and forces until the driver says that it is done."""
    SocketClient(unixsocket=SOCKET, timeout=600).run(atoms)


def ipi_drives() -> np.ndarray:
    write("beads.xyz", atoms, format="xyz")  # where i-PI starts from
    with open("ipi.log", "w") as log:
        ipi = subprocess.Popen(["i-pi", script], stdout=log)
        while not Path(f"/tmp/ipi_{SOCKET}").exists() and ipi.poll() is None:
            time.sleep(0.1)
        serve()
        ipi.wait(60)
    return np.loadtxt("ipi.out")[:, 3:5]


def ase_drives() -> np.ndarray:
    beads, rng, log = atoms.copy(), np.random.default_rng(1), []
    client = threading.Thread(target=serve)  # elsewhere, as a rule: here both share a process
    with SocketIOCalculator(unixsocket=SOCKET, timeout=60) as beads.calc:
        client.start()
        thermalize_momenta(beads, temperature_K=T, rng=rng)
        dynamics = LangevinBAOAB(
            beads, 2 * units.fs, temperature_K=T, T_tau=100 * units.fs, rng=rng
        )
        dynamics.attach(lambda: log.append((beads.get_temperature(), beads.get_potential_energy())))
        dynamics.run(100)
    client.join(60)
    return np.array(log)


with_ipi = shutil.which("i-pi") is not None
temperature, energy = (ipi_drives() if with_ipi else ase_drives()).T
print(f"{'i-PI' if with_ipi else 'ASE'} took {len(energy) - 1} steps")
print(f"kinetic temperature {temperature.mean():.0f} K of {T:.0f} K")
print(f"free energy {energy.mean():.3f} eV")

"""Bead dynamics of alanine dipeptide with ASE; writes beads.extxyz into the current folder.

Usage: python ase_langevin.py [MODEL]
"""

import sys
from pathlib import Path

import numpy as np
from ase import units
from ase.geometry import get_dihedrals
from ase.io import write
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.velocitydistribution import thermalize_momenta

from ccg_ase import CGCalculator

folder = Path(__file__).parent
model = sys.argv[1] if len(sys.argv) > 1 else folder / "alanine_dipeptide.ccg"

calculator = CGCalculator.load(model, replicas=16)  # independent copies, one evaluation for all
atoms = calculator.atoms()  # 16 x 5 beads with names, masses and the calculator
T = calculator.temperature_K  # the energy is a free energy: it holds at this temperature only
rng = np.random.default_rng(0)
thermalize_momenta(atoms, temperature_K=T, rng=rng)
dynamics = LangevinBAOAB(atoms, 4 * units.fs, temperature_K=T, T_tau=1000 * units.fs, rng=rng)
saved = []
dynamics.attach(lambda: saved.append(atoms.positions.reshape(16, 5, 3).copy()), interval=100)
energies = []
dynamics.attach(lambda: energies.append(atoms.get_potential_energy() / 16), interval=100)
dynamics.run(2000)

beads = np.array(saved[6:]).swapaxes(0, 1)  # one copy after the other, without the first 2 ps
write("beads.extxyz", [calculator.cg_map.to_ase(frame) for frame in beads.reshape(-1, 5, 3)])

print(f"{beads.shape[0]} copies x {beads.shape[1]} frames in beads.extxyz")
print(f"free energy of a copy {np.mean(energies[6:]):.3f} eV")
# Bond vibrations are fast for this time step: BAOAB samples positions well, velocities read cold.
print(f"kinetic temperature {atoms.get_temperature():.0f} K of {T:.0f} K")
chain = np.diff(beads.reshape(-1, 5, 3), axis=1).swapaxes(0, 1)
phi, psi = ((get_dihedrals(*chain[k : k + 3]) + 180) % 360 - 180 for k in (0, 1))
print(f"φ < 0, ψ > 60° (extended, C7eq): {np.mean((phi < 0) & (psi > 60)):.0%}")
print(f"φ < 0, ψ < 60° (right-handed helix): {np.mean((phi < 0) & (psi <= 60)):.0%}")
print(f"φ > 0 (left-handed helix, C7ax): {np.mean(phi >= 0):.0%}")

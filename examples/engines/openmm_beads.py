"""Bead dynamics of alanine dipeptide with OpenMM; writes beads.dcd and beads.pdb.

Usage: python openmm_beads.py [MODEL]
"""

import sys
from pathlib import Path

import numpy as np
from openmm import LangevinMiddleIntegrator, Platform
from openmm.app import DCDReporter, PDBReporter, Simulation, StateDataReporter
from openmm.unit import angstrom, femtoseconds, kelvin, picosecond

from ccg_ase import ForceField, load_model
from ccg_ase.openmm_force import bead_system, check_temperature

folder = Path(__file__).parents[1] / "alanine_dipeptide"
model = sys.argv[1] if len(sys.argv) > 1 else folder / "alanine_dipeptide.ccg"

force_field = ForceField.from_model(load_model(model))
T = force_field.temperature_K  # the energy is a free energy: it holds at this temperature only
system, topology = bead_system(force_field, replicas=8)  # copies that don't see each other
integrator = LangevinMiddleIntegrator(T * kelvin, 1 / picosecond, 4 * femtoseconds)
integrator.setRandomNumberSeed(1)
# For few beads, Reference is the fastest platform.
simulation = Simulation(topology, system, integrator, Platform.getPlatformByName("Reference"))
check_temperature(simulation.context, T)
beads = np.tile(force_field.reference_beads.double().numpy(), (8, 1))
simulation.context.setPositions(beads * angstrom)
simulation.context.setVelocitiesToTemperature(T * kelvin, 1)
simulation.reporters += [
    DCDReporter("beads.dcd", 50),
    PDBReporter("beads.pdb", 500),
    StateDataReporter(sys.stdout, 100, step=True, potentialEnergy=True, temperature=True),
]
simulation.step(500)

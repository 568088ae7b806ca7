"""Bead dynamics of alanine dipeptide with torch-sim: pip install "ccg[torchsim]".

Usage: python torch_sim_beads.py [MODEL]
"""

import sys
from pathlib import Path

import numpy as np
import torch_sim as ts

from ccg_ase import ForceField, load_model
from ccg_ase.torch_sim_model import BeadModel

folder = Path(__file__).parents[1] / "alanine_dipeptide"
path = sys.argv[1] if len(sys.argv) > 1 else folder / "alanine_dipeptide.ccg"

force_field = ForceField.from_model(load_model(path))
model = BeadModel(force_field)
beads = model.cg_map.to_ase(force_field.reference_beads.double().numpy())
integrators = getattr(ts, "Integrator", ts.integrators)  # the latter until torch-sim 0.3
final = ts.integrate(
    [beads] * 32,
    model,
    integrator=integrators.nvt_langevin,
    n_steps=250,
    temperature=model.temperature_K,  # the energy is a free energy: it holds here only
    timestep=0.002,  # ps
)
positions = final.positions.numpy().reshape(32, 5, 3)
bonds = np.linalg.norm(np.diff(positions, axis=1), axis=-1)
print(f"32 systems after 250 steps: free energy {final.energy.mean():.3f} eV")
print("bonds", *(f"{r:.3f} ± {s:.3f} Å" for r, s in zip(bonds.mean(0), bonds.std(0), strict=True)))

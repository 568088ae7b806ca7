"""Shared material of the ccg_mda tests: alanine dipeptide and an exactly known backmapper."""

from pathlib import Path

import MDAnalysis as mda
import numpy as np
import torch

from ccg_mda.universe import cg_map

PDB = Path(__file__).parents[1] / "data" / "alanine_dipeptide.pdb"
BACKBONE = {"CY": "index 4", "N": "index 6", "CA": "index 8", "C": "index 14", "NT": "index 16"}
N_FRAMES = 30


def dipeptide(n_frames=1, seed=0, **attributes):
    """Alanine dipeptide with bonds and n_frames of jittered coordinates in memory."""
    u = mda.Universe(PDB, to_guess=("types", "masses", "bonds"))
    rng = np.random.default_rng(seed)
    jitter = 0.03 * rng.normal(size=(n_frames, 22, 3)).cumsum(axis=0)
    u.load_new(u.atoms.positions + jitter.astype(np.float32), dt=2.0, **attributes)
    return u


def slice_map():
    return cg_map(dipeptide(), BACKBONE)


class GaussianBackmapper(torch.nn.Module):
    """Every atom but the beads is normal around its bead, at an offset that the beads shift.

    The matrix product makes results depend on the batch in their last bits, as networks do.
    """

    def __init__(self, the_map, temperature_K=300.0, sigma_A=0.1):
        super().__init__()
        self.cg_map, self.temperature_K, self.sigma = the_map, temperature_K, sigma_A
        self.placed = np.setdiff1d(np.arange(the_map.n_atoms), the_map.bead_atoms)
        self.n_dof = 3 * len(self.placed)
        generator = torch.Generator().manual_seed(1)
        mix, back = (
            torch.randn(*shape, generator=generator, dtype=torch.float64) / 10
            for shape in ((3 * the_map.n_beads, 64), (64, self.n_dof))
        )
        self.mix, self.back = torch.nn.Parameter(mix), torch.nn.Parameter(back)
        self.n_rows = 0

    def sample_noise(self, rng, shape=()):
        return torch.from_numpy(rng.normal(size=(*shape, self.n_dof)))

    def forward(self, beads, *, temperature_K=None, box=None):
        assert beads.dtype == torch.float64
        assert torch.get_num_threads() == 1
        if temperature_K not in (None, self.temperature_K):
            raise ValueError(f"holds at {self.temperature_K} K, not at {temperature_K} K")
        self.n_rows += beads.shape[0]
        centred = (beads - beads.mean(-2, keepdim=True)).flatten(-2)
        shift = torch.tanh(centred @ self.mix) @ self.back
        return _Placed(self, beads, shift.unflatten(-1, (-1, 3)))


class _Placed:
    def __init__(self, model, beads, shift):
        self.model, self.beads, self.shift = model, beads, shift

    def positions_and_log_prob_from(self, noise):
        model = self.model
        steps = noise.unflatten(-1, (-1, 3))
        owner = model.cg_map.owner[model.placed]
        positions = self.beads.new_empty(*noise.shape[:-1], model.cg_map.n_atoms, 3)
        positions[..., model.cg_map.bead_atoms, :] = self.beads
        positions[..., model.placed, :] = (
            self.beads[..., owner, :] + self.shift + model.sigma * steps
        )
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(noise) - np.log(model.sigma)
        return positions, normal.sum(-1)

"""A harmonic molecule in which every quantity of coarse graining is known in closed form.

U(x) = (x - x0)ᵀ K (x - x0) / 2 with the beads a subset of the atoms. K is positive definite (the
bead atoms are pinned), so that p(x), p(s) and p(x|s) are all proper Gaussians. With blocks b
(beads) and r (the rest) of K, d = 3 n_rest, δ = s - s0 and kT:

- p(r|s) is Gaussian with mean r0 - K_rr⁻¹ K_rb δ and covariance kT K_rr⁻¹;
- A = K_bb - K_br K_rr⁻¹ K_rb (Schur complement); F(s) = -kT ln Z(s), ln Z(s) =
  -δᵀAδ/2kT + (d/2) ln 2πkT - ln det K_rr / 2; mean force -Aδ;
- E[U|s] = δᵀAδ/2 + d kT/2, so the entropy (E[U|s] - F)/T doesn't depend on s;
- the slice force has covariance kT K_br K_rr⁻¹ K_rb at fixed s.
"""

from __future__ import annotations

import numpy as np
import torch

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.units import thermal_energy


class LinearGaussian:
    """The molecule, its potential (callable as one) and its exact answers; eV, Å, K."""

    def __init__(self, n_atoms=8, bead_atoms=(0, 2, 4, 6), temperature_K=300.0, seed=0):
        rng = np.random.default_rng(seed)
        steps = rng.normal(size=(n_atoms, 3))
        self.x0 = np.cumsum(1.5 * steps / np.linalg.norm(steps, axis=1)[:, None], axis=0)
        bonds = np.array([(i, i + 1) for i in range(n_atoms - 1)])
        atoms = Topology(
            names=tuple(f"C{i}" for i in range(n_atoms)),
            masses=np.full(n_atoms, 12.0),
            elements=("C",) * n_atoms,
            bonds=bonds,
        )
        self.cg_map = CGMap.from_slices(atoms, bead_atoms)
        self.temperature_K = temperature_K
        self.n_atoms = n_atoms
        self.n_calls = 0
        self.K = self._network(bonds, bead_atoms)
        rest = np.setdiff1d(np.arange(n_atoms), bead_atoms)
        self.bead_dof = (3 * np.array(bead_atoms)[:, None] + np.arange(3)).ravel()
        self.rest_dof = (3 * rest[:, None] + np.arange(3)).ravel()
        b, r = self.bead_dof, self.rest_dof
        self.K_rr = self.K[np.ix_(r, r)]
        self.response = -np.linalg.solve(self.K_rr, self.K[np.ix_(r, b)])  # d mean(r) / d s
        self.schur = self.K[np.ix_(b, b)] + self.K[np.ix_(b, r)] @ self.response
        self.n_rest_dof = len(r)

    def _network(self, bonds, bead_atoms):
        """Stiff along each bond, softer across it; a pin on every bead."""
        K = np.zeros((self.n_atoms, 3, self.n_atoms, 3))
        for i, j in bonds:
            n = self.x0[j] - self.x0[i]
            n /= np.linalg.norm(n)
            k = 3.0 * np.outer(n, n) + 0.7 * np.eye(3)  # eV/Å²
            K[i, :, i] += k
            K[j, :, j] += k
            K[i, :, j] -= k
            K[j, :, i] -= k
        for i in bead_atoms:
            K[i, :, i] += 0.2 * np.eye(3)
        return K.reshape(3 * self.n_atoms, 3 * self.n_atoms)

    # ------------------------------------------------------- as a Potential

    def __call__(self, positions):
        x = np.asarray(positions, float)
        delta = (x - self.x0).reshape(*x.shape[:-2], -1)
        self.n_calls += int(np.prod(x.shape[:-2]))
        forces = -delta @ self.K
        return -0.5 * (forces * delta).sum(-1), forces.reshape(x.shape)

    # ------------------------------------------------------------- the truth

    def kT(self, temperature_K=None):
        return thermal_energy(temperature_K or self.temperature_K)

    def _delta(self, beads):
        beads = np.asarray(beads, float)
        return beads.reshape(*beads.shape[:-2], -1) - self.x0.ravel()[self.bead_dof]

    def _strain(self, beads):
        delta = self._delta(beads)
        return 0.5 * np.einsum("...i,ij,...j->...", delta, self.schur, delta)

    def log_partition(self, beads, temperature_K=None):
        kT, d = self.kT(temperature_K), self.n_rest_dof
        constant = 0.5 * (d * np.log(2 * np.pi * kT) - np.linalg.slogdet(self.K_rr)[1])
        return constant - self._strain(beads) / kT

    def free_energy(self, beads, temperature_K=None):
        return -self.kT(temperature_K) * self.log_partition(beads, temperature_K)

    def mean_force(self, beads):
        delta = self._delta(beads)
        return (-delta @ self.schur).reshape(np.shape(beads))

    def mean_energy(self, beads, temperature_K=None):
        return self._strain(beads) + 0.5 * self.n_rest_dof * self.kT(temperature_K)

    def entropy(self, beads, temperature_K=None):
        T = temperature_K or self.temperature_K
        return (self.mean_energy(beads, T) - self.free_energy(beads, T)) / T

    def log_partition_all(self):
        """ln ∫ exp(-U/kT) dx over all atoms."""
        n = 3 * self.n_atoms
        return 0.5 * (n * np.log(2 * np.pi * self.kT()) - np.linalg.slogdet(self.K)[1])

    def slice_force_variance(self):
        """Variance of the forces on the bead atoms at fixed s, shape (n_beads, 3), (eV/Å)²."""
        coupling = self.K[np.ix_(self.bead_dof, self.rest_dof)]
        return -self.kT() * np.diag(coupling @ self.response).reshape(-1, 3)

    # --------------------------------------------------------------- samples

    def sample(self, n, rng):
        """Draw all atoms from p(x), shape (n, n_atoms, 3)."""
        noise = rng.normal(size=(n, 3 * self.n_atoms)) * np.sqrt(self.kT())
        root = np.linalg.cholesky(self.K)
        return self.x0 + np.linalg.solve(root.T, noise.T).T.reshape(n, self.n_atoms, 3)

    def sample_beads(self, n, rng):
        return self.cg_map.apply(self.sample(n, rng))


class NormalNoise(torch.nn.Module):
    """The part of a backmapper's interface that is about its noise: n_dof standard normals."""

    def sample_noise(self, rng, shape=()):
        return torch.from_numpy(rng.standard_normal((*shape, self.n_dof)))

    def log_base(self, noise):
        return -0.5 * (noise**2).sum(-1) - 0.5 * self.n_dof * np.log(2 * np.pi)

    @property
    def circular_noise(self):
        return torch.zeros(self.n_dof, dtype=torch.bool)


class GaussianBackmapper(NormalNoise):
    """p(x|s) of a `LinearGaussian`, exact or distorted in units of its own standard deviations.

    In whitened coordinates y of p(.|s), q is Gaussian with mean t(s) and variance c(s)² per
    dimension: t = shift + bend sin(P δ) and ln c = ln scale + stretch sin(v·δ). Shift 0, scale 1,
    bend 0, stretch 0 give q = p. Same interface as ccg_mda.flow.Backmapper.
    """

    def __init__(self, molecule, *, shift=0.0, scale=1.0, bend=0.0, stretch=0.0, seed=0):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.molecule, self.cg_map = molecule, molecule.cg_map
        self.temperature_K = molecule.temperature_K
        self.n_dof = d = molecule.n_rest_dof
        self.scale, self.bend, self.stretch = scale, bend, stretch
        covariance = molecule.kT() * np.linalg.inv(molecule.K_rr)
        directions = rng.normal(size=(d, len(molecule.bead_dof)))
        for name, value in {
            "root": np.linalg.cholesky(covariance),
            "response": molecule.response,
            "x0": molecule.x0.ravel(),
            "shift": shift * rng.choice([-1.0, 1.0], size=d),
            "directions": directions,
            "breath": directions[0],
        }.items():
            self.register_buffer(name, torch.as_tensor(value))

    def forward(self, beads, *, temperature_K=None, box=None):
        if temperature_K not in (None, self.temperature_K):
            raise ValueError("this Gaussian holds at one temperature")
        return GaussianDistribution(self, beads)

    # Closed forms; per whitened dimension p = N(0, 1) and q = N(t, c²).

    def distortion(self, beads):
        """t(s), shape (..., d), and c(s), shape (...)."""
        delta = beads.flatten(-2) - self.x0[self.molecule.bead_dof]
        t = self.shift + self.bend * torch.sin(delta @ self.directions.T)
        return t, self.scale * torch.exp(self.stretch * torch.sin(delta @ self.breath))

    def _distortion(self, beads):
        t, c = self.distortion(torch.as_tensor(beads))
        return (t**2).sum(-1).numpy(), c.numpy() ** 2

    def ess(self, beads):
        """Effective sample size as a fraction, 1 / E_q[(p/q)²]; c² must exceed 1/2."""
        t2, c2 = self._distortion(beads)
        return (np.sqrt(2 * c2 - 1) / c2) ** self.n_dof * np.exp(-t2 / (2 * c2 - 1))

    def reverse_kl(self, beads):
        """KL(q || p) per state, in nats."""
        t2, c2 = self._distortion(beads)
        return 0.5 * (self.n_dof * (c2 - 1 - np.log(c2)) + t2)

    def forward_kl(self, beads):
        """KL(p || q) per state, in nats."""
        t2, c2 = self._distortion(beads)
        return 0.5 * (self.n_dof * (np.log(c2) + 1 / c2 - 1) + t2 / c2)


class GaussianDistribution:
    """q(x|s) of a `GaussianBackmapper` at beads of shape (*B, n_beads, 3)."""

    def __init__(self, model, beads):
        self.model, self.beads, self.batch = model, beads, beads.shape[:-2]
        molecule = model.molecule
        delta = beads.flatten(-2) - model.x0[molecule.bead_dof]
        self.mean = model.x0[molecule.rest_dof] + delta @ model.response.T
        self.t, self.c = model.distortion(beads)

    def positions_and_log_prob_from(self, noise):
        molecule, model = self.model.molecule, self.model
        white = self.t + self.c[..., None] * noise
        rest = self.mean + white @ model.root.T
        flat = noise.new_empty(*noise.shape[:-1], 3 * molecule.n_atoms)
        flat[..., molecule.rest_dof] = rest
        flat[..., molecule.bead_dof] = self.beads.flatten(-2).expand(*noise.shape[:-1], -1)
        return flat.unflatten(-1, (-1, 3)), self._log_prob_of(noise)

    def _log_prob_of(self, noise):
        log_det = model_log_det(self.model) + self.model.n_dof * torch.log(self.c)
        return self.model.log_base(noise) - log_det

    def positions_from(self, noise):
        return self.positions_and_log_prob_from(noise)[0]

    def noise_from(self, positions):
        rest = positions.flatten(-2)[..., self.model.molecule.rest_dof]
        white = torch.linalg.solve_triangular(
            self.model.root, (rest - self.mean).unsqueeze(-1), upper=False
        ).squeeze(-1)
        return (white - self.t) / self.c[..., None]

    def log_prob(self, positions):
        return self._log_prob_of(self.noise_from(positions))

    def rsample_and_log_prob(self, shape=(), rng=None):
        noise = self.model.sample_noise(rng, (*shape, *self.batch))
        return self.positions_and_log_prob_from(noise)

    def rsample(self, shape=(), rng=None):
        return self.rsample_and_log_prob(shape, rng)[0]


def model_log_det(model):
    """ln det of the Cholesky root of the conditional covariance."""
    return torch.log(torch.diagonal(model.root)).sum()

"""All-atom samples at given bead states, and the mean-force labels pulled back from them (E3).

A label is f = kT ∂l/∂s at fixed noise ε, with x = x(s, ε) and l = -U(x)/kT - ln q(x|s). Its average
over p(x|s) is the mean force -∂F/∂s, and its scatter vanishes as q approaches p. On samples of q
it is averaged with self-normalised weights, on frames of atomistic dynamics without any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ccg_ase.devices import device_of
from ccg_ase.torsion_map import TorsionMap
from ccg_ase.units import thermal_energy
from ccg_mda.potential import Potential

from .distributed import spread
from .reference import MDANALYSIS_FORCE
from .samples import Samples
from .superposition import superposing_rotation

if TYPE_CHECKING:
    from MDAnalysis import Universe

ROUND_TRIP_TOLERANCE_A = 1e-4


class FrameNotCoveredError(ValueError):
    """A frame lies where the backmapper has no density."""


def reconstruct(
    backmapper: nn.Module,
    potential: Potential,
    beads: np.ndarray,
    n_samples: int,
    rng: np.random.Generator,
    *,
    batch_size: int = 1024,
) -> Samples:
    """Draw samples of q(x|s) at every bead state and label them (E3a).

    Parameters
    ----------
    backmapper
        A `Backmapper`.
    potential
        Atomistic energies and forces; called once per sample.
    beads
        Coarse states, (S, n_beads, 3) in Å or (S, n_torsions) in rad.
    n_samples
        K, samples per state.
    rng
        Source of the noise.
    batch_size
        Samples per pass, which bounds the memory of the graph; it doesn't change the noise.
    """
    noise = backmapper.sample_noise(rng, (n_samples, len(beads)))
    work = partial(_at_states, backmapper, potential, batch_size)
    portions = _batches(len(beads), max(1, batch_size // n_samples))
    parts = spread(work, [(beads[part], noise[:, part]) for part in portions])
    return Samples.concatenate(*parts)


def _at_states(
    backmapper: nn.Module,
    potential: Potential,
    batch_size: int,
    portion: tuple[np.ndarray, torch.Tensor],
) -> Samples:
    return pull_back(backmapper, potential, *portion, batch_size=batch_size)


def pull_back(
    backmapper: nn.Module,
    potential: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    beads: np.ndarray,
    noise: torch.Tensor,
    *,
    batch_size: int = 1024,
) -> Samples:
    """Label the samples that belong to given noise: f = kT ∂/∂s [-U(x(s, ε))/kT - ln q(x(s, ε)|s)].

    The atomistic forces enter through the surrogate (forces/kT · x), whose gradient in s is that
    of -U/kT, so no differentiable potential is needed: one pass forward, one back.

    Parameters
    ----------
    backmapper, potential, beads, batch_size
        As in `reconstruct`.
    noise
        Base noise ε, (K, S, n_dof), held fixed.

    Raises
    ------
    ValueError
        If shapes don't fit.
    """
    states, inner = _float64(beads, backmapper), backmapper.cg_map.coarse_shape
    fits = noise.ndim == 3 and states.shape == (noise.shape[1], *inner)
    if not fits:
        raise ValueError(
            f"need states (S, {', '.join(map(str, inner))}) and noise (K, S, n_dof) with one S; "
            f"got {tuple(states.shape)} and {tuple(noise.shape)}"
        )
    n_samples, n_states = noise.shape[:2]
    flat_noise = noise.detach().to(states).transpose(0, 1).flatten(0, 1)
    flat_states = states.repeat_interleave(n_samples, 0)
    pieces = [
        _pull_back_batch(backmapper, potential, flat_states[part], flat_noise[part])
        for part in _batches(len(flat_noise), batch_size)
    ]
    arrays = [np.concatenate(piece) for piece in zip(*pieces, strict=True)]
    x, energy, forces, log_prob, labels = (
        array.reshape(n_states, n_samples, *array.shape[1:]) for array in arrays
    )
    return Samples(
        beads=states.cpu().numpy(),
        positions=x,
        forces=forces,
        energy=energy,
        log_prob=log_prob,
        labels=labels,
        cg_map=backmapper.cg_map,
        temperature_K=backmapper.temperature_K,
        n_calls=n_states * n_samples,
    )


def pull_back_frames(
    backmapper: nn.Module,
    positions: np.ndarray,
    energy: np.ndarray,
    forces: np.ndarray,
    *,
    batch_size: int = 1024,
) -> Samples:
    """Label frames of the atomistic ensemble (E3b): K = 1, no weight and no new energy call.

    Where s are torsions, the frames returned are rotated: see `in_own_frame`.

    Parameters
    ----------
    backmapper, batch_size
        As in `reconstruct`.
    positions, energy, forces
        Stored frames of p(x): (S, n_atoms, 3) Å, (S,) eV, (S, n_atoms, 3) eV/Å.

    Raises
    ------
    FrameNotCoveredError
        If the backmapper doesn't return a frame from its own noise.
    """
    positions, forces = in_own_frame(backmapper, positions, forces)
    x = _float64(positions, backmapper)
    beads = backmapper.cg_map.apply(x)
    noise = []
    with torch.no_grad():
        for part in _batches(len(x), batch_size):
            distribution = backmapper(beads[part])
            noise.append(distribution.noise_from(x[part]))
            error = (distribution.positions_from(noise[-1]) - x[part]).abs().amax((-1, -2))
            worst = int(error.nan_to_num(torch.inf).argmax())
            if not error[worst] <= ROUND_TRIP_TOLERANCE_A:
                raise FrameNotCoveredError(
                    f"frame {part.start + worst} comes back from its noise {error[worst]:.1e} Å "
                    "off: the backmapper doesn't cover it (another molecule, mirror image or "
                    "broken frame); leave it out, or train the flow on it"
                )
    stored = Replay(energy, forces)
    samples = pull_back(
        backmapper, stored, beads.cpu().numpy(), torch.cat(noise)[None], batch_size=batch_size
    )
    return replace(samples, n_calls=0)


def in_own_frame(
    backmapper: nn.Module, positions: np.ndarray, forces: np.ndarray, *, batch_size: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """Rotate frames, and their forces with them, to where the backmapper places the molecule.

    Torsions say nothing about the orientation: the backmapper puts the first atoms on axes of its
    own. Beads do, and such frames are returned as they are.

    Parameters
    ----------
    backmapper, batch_size
        As in `reconstruct`.
    positions, forces
        Frames, (S, n_atoms, 3) in Å, and their forces.
    """
    if not isinstance(backmapper.cg_map, TorsionMap):
        return positions, forces
    x, rotated = _float64(positions, backmapper), []
    with torch.no_grad():
        for part in _batches(len(x), batch_size):
            distribution = backmapper(backmapper.cg_map.apply(x[part]))
            placed = distribution.positions_from(distribution.noise_from(x[part]))
            arms, goals = (v - v.mean(1, keepdim=True) for v in (x[part], placed))
            turn = superposing_rotation(arms, goals)
            turned = arms @ turn + placed.mean(1, keepdim=True)
            rotated.append(torch.cat([turned, _float64(forces[part], backmapper) @ turn], -1))
    both = torch.cat(rotated).cpu().numpy()
    return both[..., :3], both[..., 3:]


def read_samples(
    universe: Universe,
    backmapper: nn.Module,
    n_samples: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Read all reconstructions of a backmapped Universe, and label them.

    Parameters
    ----------
    universe
        From `ccg_mda.backmap` with a potential and `n_samples` samples per bead frame: every frame
        carries log_prob, energy and forces.
    backmapper
        The one that made it.
    n_samples
        K.
    progress
        Called with the frames read and their number.
    """
    n_frames = len(universe.trajectory)
    positions, forces = np.empty((2, n_frames, backmapper.cg_map.n_atoms, 3))
    energy, log_prob = np.empty((2, n_frames))
    for frame, ts in enumerate(universe.trajectory):
        positions[frame], forces[frame] = ts.positions, ts.forces
        energy[frame], log_prob[frame] = ts.data["energy"], ts.data["log_prob"]
        if progress is not None:
            progress(frame + 1, n_frames)
    forces *= MDANALYSIS_FORCE
    labelled = pull_back_frames(backmapper, positions, energy, forces)
    shape = (n_frames // n_samples, n_samples)

    def by_state(array: np.ndarray) -> np.ndarray:
        return array.reshape(*shape, *array.shape[1:])

    return Samples(
        beads=by_state(labelled.beads)[:, 0],
        positions=by_state(positions),
        forces=by_state(forces),
        energy=by_state(energy),
        log_prob=by_state(log_prob),  # of the positions before MDAnalysis rounded them to float32
        labels=by_state(labelled.labels[:, 0]),
        cg_map=backmapper.cg_map,
        temperature_K=backmapper.temperature_K,
        n_calls=n_frames,
    )


class Replay:
    """Stored energies and forces, handed out in order as a potential would."""

    def __init__(self, energy: np.ndarray, forces: np.ndarray) -> None:
        self.energy, self.forces, self.next = np.asarray(energy), np.asarray(forces), 0

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return energies and forces of the next ``len(positions)`` frames."""
        part = slice(self.next, self.next + len(positions))
        self.next = part.stop
        return self.energy[part], self.forces[part]


def _pull_back_batch(backmapper, potential, beads, noise):
    """Positions, U, forces, ln q and labels of a flat batch of (state, noise) pairs."""
    kT = thermal_energy(backmapper.temperature_K)
    with torch.enable_grad():
        beads = beads.clone().requires_grad_()
        x, log_prob = backmapper(beads).positions_and_log_prob_from(noise)
        positions = x.detach().cpu().numpy()
        energy, forces = (np.asarray(value, dtype=np.float64) for value in potential(positions))
        log_weight = (torch.from_numpy(forces / kT).to(x) * x).sum((-1, -2)) - log_prob
        (gradient,) = torch.autograd.grad(log_weight.sum(), beads)
    return positions, energy, forces, log_prob.detach().cpu().numpy(), kT * gradient.cpu().numpy()


def _float64(array: np.ndarray, backmapper: nn.Module) -> torch.Tensor:
    return torch.as_tensor(array).detach().to(device_of(backmapper), torch.float64)


def _batches(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]

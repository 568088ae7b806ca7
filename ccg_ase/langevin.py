"""BatchedLangevin: many independent replicas in one batch of BAOAB Langevin dynamics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import units
from torch import Tensor

from ccg_ase.forcefield import ForceField
from ccg_ase.threads import one_thread
from ccg_ase.units import thermal_energy

_NOISE_BLOCK = 128  # steps of noise drawn at once, to share the cost of R generators


class BatchedLangevin:
    """Sample beads at the model's temperature, R replicas at a time.

    BAOAB splitting (Leimkuhler and Matthews, Appl. Math. Res. eXpress 2013, 34), whose positions
    are exact for harmonic wells at any stable time step. Positions and velocities are float64;
    forces come in the precision of the force field. Replica k has a random stream of its own: run
    alone with ``seed=[sampler.seeds[k]]``, it follows the same path.

    Parameters
    ----------
    force_field
        The force field; it is used as it is, on its device.
    timestep_fs, friction_per_ps
        Time step in fs and friction coefficient in 1/ps, both positive.
    seed
        One integer, from which every replica's seed follows, or a sequence of them.
    temperature_K
        None or the model's temperature: the force field is wrong at any other.
    """

    def __init__(
        self,
        force_field: ForceField,
        *,
        timestep_fs: float,
        friction_per_ps: float,
        seed: int | Sequence[int],
        temperature_K: float | None = None,
    ):
        temperature = force_field.temperature_K
        if temperature_K is not None and abs(temperature_K - temperature) > 1e-6:
            raise ValueError(
                f"the force field is a free energy at {temperature} K and can't be sampled at "
                f"{temperature_K} K"
            )
        if not (timestep_fs > 0 and friction_per_ps > 0):
            raise ValueError("timestep_fs and friction_per_ps must be positive")
        self.force_field = force_field
        self.seeds = None if np.isscalar(seed) else [int(s) for s in seed]
        self._root = np.random.SeedSequence(seed) if self.seeds is None else None
        device = force_field.reference_beads.device
        masses = torch.tensor(force_field.cg_map.beads.masses, device=device)[:, None]
        kT = thermal_energy(temperature)
        dt = timestep_fs * units.fs
        self._kick = dt / 2 / masses
        self._drift = dt / 2
        self._thermal = (kT / masses).sqrt()
        self._keep = float(np.exp(-friction_per_ps / (1000 * units.fs) * dt))
        self._stir = self._thermal * (1 - self._keep**2) ** 0.5
        self._generators: list[np.random.Generator] = []
        self._beads = self._velocities = self._forces = None
        self.n_steps = 0

    def run(self, beads: np.ndarray | Tensor | None, n_steps: int, every: int = 1) -> np.ndarray:
        """Advance all replicas and return every `every`-th frame.

        Parameters
        ----------
        beads
            Starting positions in Å, shape (R, n_beads, 3), with fresh Maxwell velocities; None to
            continue from where the last run or a loaded state stopped.
        n_steps
            Number of steps, a multiple of `every`.
        every
            Steps between saved frames.

        Returns
        -------
        np.ndarray
            Positions in Å, shape (n_steps / every, R, n_beads, 3), in the force field's precision.

        Raises
        ------
        FloatingPointError
            If a replica leaves the finite numbers, by the next saved frame.
        """
        if every < 1 or n_steps < 0 or n_steps % every:
            raise ValueError(f"n_steps ({n_steps}) must be a multiple of every ({every})")
        if beads is not None:
            self._start(beads)
        elif self._beads is None:
            raise ValueError("nothing to continue from: give starting beads, or load a state")
        frames = self._beads.new_empty(
            (n_steps // every, *self._beads.shape), dtype=self.force_field.dtype
        )
        with one_thread(), torch.no_grad():
            noise = iter(())
            for step in range(n_steps):
                if step % _NOISE_BLOCK == 0:
                    noise = iter(self._normals(min(_NOISE_BLOCK, n_steps - step)))
                self._step(next(noise))
                if (step + 1) % every == 0:
                    frames[step // every] = self._beads
        self._check_finite(frames, every)
        self.n_steps += n_steps
        return frames.cpu().numpy()

    def _step(self, noise: Tensor) -> None:
        self._velocities += self._kick * self._forces
        self._beads += self._drift * self._velocities
        self._velocities = self._keep * self._velocities + self._stir * noise
        self._beads += self._drift * self._velocities
        self._forces = self._evaluate()
        self._velocities += self._kick * self._forces

    def _evaluate(self) -> Tensor:
        # Centred, so that a diffusing molecule loses no digits in float32.
        centred = self._beads - self._beads.mean(1, keepdim=True)
        return self.force_field.energy_and_forces(centred)[1]

    def _start(self, beads: np.ndarray | Tensor) -> None:
        expected = (self.force_field.cg_map.n_beads, 3)
        beads = torch.as_tensor(beads).detach()
        if beads.ndim != 3 or tuple(beads.shape[1:]) != expected:
            raise ValueError(
                f"beads must have shape (R, {expected[0]}, 3), got {tuple(beads.shape)}"
            )
        if self.seeds is None:
            self.seeds = self._root.generate_state(len(beads), np.uint64).tolist()
        if len(self.seeds) != len(beads):
            raise ValueError(f"{len(beads)} replicas given, but there are {len(self.seeds)} seeds")
        if not self._generators:
            self._generators = [np.random.default_rng(seed) for seed in self.seeds]
        self._beads = beads.to(self._thermal.device, torch.float64, copy=True)
        self._velocities = self._thermal * self._normals(1)[0]
        with one_thread():
            self._forces = self._evaluate()

    def _normals(self, n_steps: int) -> Tensor:
        """Draw standard normals, shape (n_steps, R, n_beads, 3), as if step by step."""
        shape = (n_steps, *self._beads.shape[1:])
        drawn = np.stack([generator.standard_normal(shape) for generator in self._generators], 1)
        return torch.from_numpy(drawn).to(self._beads.device)

    def _check_finite(self, frames: Tensor, every: int) -> None:
        finite = frames.isfinite().flatten(2).all(-1)
        if not finite.all():
            frame, replica = (~finite).nonzero()[0].tolist()
            last = self.n_steps + (frame + 1) * every
            raise FloatingPointError(
                f"replica {replica} left the finite numbers by step {last} (saved every {every}): "
                "shorten timestep_fs, or check the force field outside its training data"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run continues from: plain numbers and float64 tensors."""
        if self._beads is None:
            raise ValueError("there is no state before the first run")
        return {
            "seeds": list(self.seeds),
            "n_steps": self.n_steps,
            "beads": self._beads.cpu().clone(),
            "velocities": self._velocities.cpu().clone(),
            "generators": [generator.bit_generator.state for generator in self._generators],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, with the same force field and settings to the same path."""
        device = self._thermal.device
        self.seeds, self.n_steps = list(state["seeds"]), int(state["n_steps"])
        self._beads = state["beads"].to(device, torch.float64, copy=True)
        self._velocities = state["velocities"].to(device, torch.float64, copy=True)
        self._generators = []
        for saved in state["generators"]:
            generator = np.random.default_rng()
            generator.bit_generator.state = saved
            self._generators.append(generator)
        with one_thread():
            self._forces = self._evaluate()

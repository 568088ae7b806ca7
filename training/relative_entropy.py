r"""Final stage of a force field: relative entropy, by reweighted bead dynamics.

S_rel(θ) = <E_θ>_ref / kT + ln Z_θ + const is minus the log-likelihood of the reference beads per
frame, and (Shell, J. Chem. Phys. 129, 144108 (2008); Thaler, Stupp, Zavadlav, J. Chem. Phys. 157,
244103 (2022))

    kT ∂S_rel/∂θ = <∂E_θ/∂θ>_ref - <∂E_θ/∂θ>_θ.

The last mean is over the model's own ensemble: stored frames of the model θ₀ with the weights
exp(-(E_θ - E_θ₀)/kT). Energies only, no forces: a step is cheap. A round is as many steps as the
effective sample size of the weights allows; then the new model is simulated, and judged:

    ΔS_rel = <ΔE>_held-out / kT + ln Z_new/Z_old,

on reference frames and replicas that no gradient has seen (on those that have, ln Z can be made
small by raising the energy just there). A change that isn't a gain beyond its error is undone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ccg_ase.forcefield import ForceField
from ccg_ase.graph import near_origin
from ccg_ase.units import thermal_energy
from ccg_mda.bounds import Estimate
from ccg_mda.weights import effective_sample_size, resample, weighted_average

from .bennett import PartitionRatio, log_partition_ratio
from .langevin_sampler import Sampler
from .reference_beads import ReferenceBeads

_LEAST_OVERLAP = 0.1  # effective sample size below which no free-energy difference is believed
_EVALUATION_BEADS = 2**15


@dataclass(frozen=True)
class RelativeEntropySettings:
    """How `minimise_relative_entropy` goes about it.

    Parameters
    ----------
    rounds, patience
        Simulations of a changed model at most, and how many rejected ones in a row end the stage.
        Every rejection halves the learning rate.
    steps
        Adam steps per round at most.
    batch_size, learning_rate
        Frames per step, of the reference and of the model each, and Adam's rate.
    min_ess
        Effective sample size, as a fraction, below which frames are simulated afresh.
    ema
        Decay of the running average of the weights; the average is what is simulated and judged.
    significance
        A change is accepted if S_rel falls by more than this many standard errors.
    n_replicas
        Replicas of bead dynamics; every second one only judges.
    n_blocks
        Contiguous blocks of frames that count as independent.
    seed
        Of batches, starts and simulations.
    """

    rounds: int = 20
    patience: int = 3
    steps: int = 200
    batch_size: int = 256
    learning_rate: float = 1e-3
    min_ess: float = 0.6
    ema: float = 0.9
    significance: float = 2.0
    n_replicas: int = 64
    n_blocks: int = 20
    seed: int = 0


def minimise_relative_entropy(
    force_field: ForceField,
    reference: ReferenceBeads,
    held_out: ReferenceBeads,
    sample: Sampler,
    settings: RelativeEntropySettings | None = None,
    *,
    box: np.ndarray | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Bring the model's bead ensemble to that of the reference, in the force field's precision.

    Parameters
    ----------
    force_field
        Receives the weights of the last accepted round, or keeps its own. Its energy is called at
        its own temperature.
    reference, held_out
        Frames to learn from and to judge by, at that temperature (`ReferenceBeads.split`).
    sample
        Draws from a model's ensemble, e.g. `LangevinSampler`. A FloatingPointError from it, as of
        an explosion, rejects a change.
    settings
        Default: `RelativeEntropySettings()`.
    box
        Cell vectors in rows, Å, (3, 3), of all frames; None for open space.
    progress
        Called after every round with rounds done, rounds in all, and the metrics so far.

    Returns
    -------
    dict
        `gain_nats`, by how much S_rel fell (a log-likelihood ratio per frame, zero if nothing was
        accepted), and its standard error `gain_error`; `resolution_nats`, the least gain that the
        last round could have seen; `ess` of the frames after it; `rounds`, `accepted`, `steps`.

    Raises
    ------
    ValueError
        If frames have another number of beads, or the sampler returns something else than frames.
    FloatingPointError
        From the sampler, if the force field as given explodes.
    """
    stage = _Stage(
        force_field, reference, held_out, sample, settings or RelativeEntropySettings(), box
    )
    rounds, patience = stage.settings.rounds, stage.settings.patience
    while stage.rounds < rounds and stage.rejected_in_a_row < patience:
        stage.advance()
        if progress is not None:
            progress(stage.rounds, rounds, stage.metrics())
    with torch.no_grad():
        for mine, new in zip(force_field.parameters(), stage.kept.parameters(), strict=True):
            mine.copy_(new)
    return stage.metrics()


def surrogate_loss(reference: Tensor, ensemble: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """Return a number whose gradient is that of S_rel, and the effective sample size.

    Parameters
    ----------
    reference, ensemble
        E_θ/kT of reference frames, (B,), and of frames that were drawn at θ₀, (C,).
    start
        E_θ₀/kT of the latter, (C,), without gradient.

    Returns
    -------
    loss, ess
        mean E_θ - Σ_k w_k E_θ,k over kT, with constant weights w; and 1/(C Σ_k w_k²).
    """
    weight = torch.softmax(start - ensemble.detach(), 0)
    ess = 1 / (len(weight) * (weight**2).sum())
    return reference.mean() - (weight * ensemble).sum(), float(ess)


class _Stage:
    """The accepted model with its frames, and the one in training."""

    def __init__(self, force_field, reference, held_out, sample, settings, box) -> None:
        n = force_field.cg_map.n_beads
        for part in (reference, held_out):
            if part.beads.shape[1] != n:
                raise ValueError(f"need frames of {n} beads, got frames of {part.beads.shape[1]}")
        if settings.n_replicas < 2:
            raise ValueError(f"n_replicas must be at least 2, got {settings.n_replicas}")
        self.reference, self.held_out = reference, held_out
        self.sample, self.settings = sample, settings
        self.kT = thermal_energy(force_field.temperature_K)
        self.rng = np.random.default_rng(settings.seed)
        parameter = next(force_field.parameters())
        self.place = {"dtype": parameter.dtype, "device": parameter.device}
        self.box = None if box is None else torch.as_tensor(box).to(torch.float64)
        self.start, self.kept, self.model, self.average = (
            copy.deepcopy(force_field) for _ in range(4)
        )
        self.average.requires_grad_(False)
        self.learning_rate = settings.learning_rate
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.learning_rate)
        # ln Z of the kept model over that of the start; errors of frames of the past and of today.
        self.log_ratio = PartitionRatio(0.0, 0.0, 0.0)
        self.rounds = self.accepted = self.rejected_in_a_row = self.steps = 0
        self.ess, self.change = 1.0, Estimate(np.nan, np.nan)
        self.frames = self._simulate(self.kept, reference.draw(settings.n_replicas, self.rng))

    def metrics(self) -> dict[str, float]:
        """Return what `minimise_relative_entropy` does, and the change of the last round."""
        moved, error = self._of_held_out(self.kept, self.start)
        return {
            "gain_nats": -float(moved + self.log_ratio.value),
            "gain_error": math.hypot(error, self.log_ratio.error),
            "change_nats": float(self.change.value),
            "resolution_nats": self.settings.significance * float(self.change.error),
            "ess": self.ess,
            "rounds": self.rounds,
            "accepted": self.accepted,
            "steps": self.steps,
        }

    def advance(self) -> None:
        """Do one round: descend, simulate, accept or undo."""
        self._descend()
        judged = self._judge()
        self.rounds += 1
        needed = self.settings.significance * self.change.error
        if judged is not None and self.change.value < -needed:
            ratio, self.frames = judged
            self.accepted, self.rejected_in_a_row = self.accepted + 1, 0
            before = self.log_ratio
            # Frames serve twice, as the end of one step and the start of the next. Steps in one
            # direction feel their fluctuation alike, so that these two errors add up.
            past = math.hypot(before.error_a, before.error_b + ratio.error_a)
            self.log_ratio = PartitionRatio(before.value + ratio.value, past, ratio.error_b)
            self.kept.load_state_dict(self.average.state_dict())
        else:
            self.rejected_in_a_row += 1
            self.learning_rate /= 2
            self.optimizer = torch.optim.Adam(self.model.parameters(), self.learning_rate)
        for module in (self.model, self.average):
            module.load_state_dict(self.kept.state_dict())

    def _descend(self) -> None:
        """Adam steps on reweighted frames, while they stand for the model."""
        size, frames = self.settings.batch_size, self.frames[0].flatten(0, 1)
        start = self._energies(self.kept, frames)
        weights, averages = list(self.model.parameters()), list(self.average.parameters())
        for _ in range(self.settings.steps):
            chosen = torch.from_numpy(self.rng.integers(len(frames), size=size))
            ours = torch.from_numpy(self.reference.draw(size, self.rng))
            energy = self._reduced(self.model, torch.cat([ours, frames[chosen]]))
            loss, self.ess = surrogate_loss(energy[:size], energy[size:], start[chosen].to(energy))
            if not self.ess >= self.settings.min_ess:  # NaN isn't, either
                return
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.steps += 1
            torch._foreach_lerp_(averages, [w.detach() for w in weights], 1 - self.settings.ema)

    def _judge(self) -> tuple[PartitionRatio, tuple[Tensor, Tensor]] | None:
        """Simulate the averaged model and find the change; None where there is no telling."""
        self.change = Estimate(np.nan, np.nan)
        shifts = [self._difference(part) for part in self.frames]
        if not all(
            np.isfinite(w).all() and effective_sample_size(-w) > _LEAST_OVERLAP for w in shifts
        ):
            return None
        # Frames reweighted to the new model are where its replicas start, each half from its own.
        starts = np.empty((self.settings.n_replicas, *self.frames[0].shape[2:]))
        for half, (part, w) in enumerate(zip(self.frames, shifts, strict=True)):
            chosen = resample(-w, len(starts[half::2]), self.rng)
            starts[half::2] = part.flatten(0, 1)[torch.from_numpy(chosen)]
        try:
            frames = self._simulate(self.average, starts)
        except FloatingPointError:
            return None
        blocks = self.settings.n_blocks
        ratio = log_partition_ratio(shifts[1], self._difference(frames[1]), n_blocks=blocks)
        moved, error = self._of_held_out(self.average, self.kept)
        self.change = Estimate(moved + ratio.value, math.hypot(error, ratio.error))
        return ratio, frames

    def _simulate(self, model: ForceField, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return frames to learn from and to judge by, both (replicas, S, n, 3), float64."""
        seed = int(self.rng.integers(2**31))
        frames = self.sample(model, starts, seed)
        if frames.ndim != 4 or frames.shape[1:] != starts.shape:
            expected = ", ".join(map(str, starts.shape))
            raise ValueError(f"the sampler must return (S, {expected}), got {frames.shape}")
        frames = torch.from_numpy(np.array(frames.swapaxes(0, 1), dtype=float))
        return frames[::2], frames[1::2]

    def _difference(self, frames: Tensor) -> np.ndarray:
        """(E_average - E_kept)/kT of frames (replicas, S, n, 3), flat, replica after replica."""
        frames = frames.flatten(0, 1)
        return (self._energies(self.average, frames) - self._energies(self.kept, frames)).numpy()

    def _of_held_out(self, new: ForceField, old: ForceField) -> tuple[float, float]:
        """Mean of (E_new - E_old)/kT over held-out reference frames, and its standard error."""
        beads = torch.from_numpy(self.held_out.beads)
        difference = (self._energies(new, beads) - self._energies(old, beads)).numpy()
        log_weight, blocks = self.held_out.log_weight, self.settings.n_blocks
        return weighted_average(difference, log_weight, n_blocks=min(blocks, len(beads)))

    def _energies(self, model: ForceField, frames: Tensor) -> Tensor:
        """E/kT of frames (N, n, 3), float64, without gradient, on the CPU."""
        size = max(1, _EVALUATION_BEADS // frames.shape[1])
        with torch.no_grad():
            return torch.cat([self._reduced(model, part).cpu() for part in frames.split(size)])

    def _reduced(self, model: ForceField, frames: Tensor) -> Tensor:
        """E/kT of one batch of frames, float64.

        Frames have drifted: they are centred, or wrapped, so that no digits are lost.
        """
        frames = near_origin(frames, self.box)
        box = None if self.box is None else self.box.to(**self.place)
        return model(frames.to(**self.place), box=box).double() / self.kT

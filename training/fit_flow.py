"""Fitting the flow: likelihood first, then the forces and energies that the frames already carry.

Terms of the loss on a frame (x, s) with stored force and energy, after `flow_recipe.md`:

- ``likelihood``   -ln q(x|s): forward KL.
- ``noise_force``  |∇_z ln w|², with ln w = -U/kT - ln q at x(z, s): zero everywhere if q is exact.
- ``label``        |f - f(s)|², the scatter of the pulled-back label f = kT ∇_s ln w at fixed noise
  around the bead force: zero everywhere if q and the bead force are exact.
- ``energy``       (ln w + F(s)/kT - c)², Huber: zero everywhere if both models are exact.

The noise is a function of x *with its graph*: detached, x would move with the parameters while its
force stays behind.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from ccg_ase.units import thermal_energy
from ccg_mda.flow import Backmapper

ProgressCallback = Callable[[int, int, dict[str, float]], None]

_HUBER_KT = 4.0  # residuals of ln w beyond this count linearly
_LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True)
class FlowFrames:
    """Frames to learn from.

    Attributes
    ----------
    positions
        Shape (n, n_atoms, 3) in Å.
    weight
        Relative weight of each frame, shape (n,): one for unbiased frames of a trajectory.
    forces, energy
        Atomistic forces (n, n_atoms, 3) in eV/Å and energies (n,) in eV.
    bead_force, free_energy
        The bead force field at each frame: -∂F/∂s (n, n_beads, 3) in eV/Å and F (n,) in eV.
    """

    positions: np.ndarray
    weight: np.ndarray
    forces: np.ndarray | None = None
    energy: np.ndarray | None = None
    bead_force: np.ndarray | None = None
    free_energy: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def joined(self, other: FlowFrames) -> FlowFrames:
        """Return the frames of both; all arrays of one must be there in the other."""
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return FlowFrames(*(None if a is None else np.concatenate([a, b]) for a, b in pairs))


@dataclass(frozen=True)
class FlowLoss:
    """Weights of the terms of the loss; the defaults are those of `flow_recipe.md`, run FB."""

    likelihood: float = 1.0
    noise_force: float = 2.0
    label: float = 0.03
    energy: float = 10.0

    @property
    def needs_forces(self) -> bool:
        """True if any term pushes the frame through the flow and back."""
        return bool(self.noise_force or self.label)


LIKELIHOOD_ONLY = FlowLoss(noise_force=0.0, label=0.0, energy=0.0)


def relabellings(flow: Backmapper, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw random cyclic relabellings of the identical atoms of each rotor, (n, n_atoms) indices.

    The flow's rotors cover every labelling of a methyl group; a trajectory of finite length visits
    them unevenly. A random relabelling of every frame makes the data cover all of them too.
    """
    order = np.tile(np.arange(flow.cg_map.n_atoms), (n, 1))
    for group in flow.placement.rotor_groups:
        turns = np.arange(len(group)) + rng.integers(len(group), size=(n, 1))
        order[:, group] = np.take(group, turns, mode="wrap")
    return order


class _Batches:
    """Random mini-batches in single precision and units of kT, relabelled afresh each time."""

    def __init__(self, flow: Backmapper, frames: FlowFrames, rng: np.random.Generator) -> None:
        kt = thermal_energy(flow.temperature_K)
        self._flow, self._rng = flow, rng
        centred = frames.positions - frames.positions.mean(1, keepdims=True)  # keeps float32 sharp
        self._by_atom = {"positions": centred}
        self._by_frame = {"weight": frames.weight / frames.weight.mean()}
        if frames.forces is not None:
            self._by_atom["forces"] = frames.forces / kt
        if frames.bead_force is not None:
            self._by_frame["bead_force"] = frames.bead_force / kt
        if frames.energy is not None and frames.free_energy is not None:
            excess = (frames.energy - frames.free_energy) / kt
            self._by_frame["excess_energy"] = excess - excess.mean()
        for arrays in (self._by_atom, self._by_frame):
            for name, array in arrays.items():
                arrays[name] = torch.from_numpy(np.asarray(array, np.float32))

    def draw(self, size: int) -> dict[str, Tensor]:
        """Return one batch of ``size`` frames, drawn with replacement."""
        n = len(self._by_frame["weight"])
        chosen = torch.from_numpy(self._rng.integers(0, n, size))
        order = torch.from_numpy(relabellings(self._flow, size, self._rng))
        order = order[..., None].expand(-1, -1, 3)
        batch = {name: torch.gather(a[chosen], 1, order) for name, a in self._by_atom.items()}
        return batch | {name: a[chosen] for name, a in self._by_frame.items()}


def flow_loss(
    flow: Backmapper, batch: dict[str, Tensor], terms: FlowLoss
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a batch and the value of each of its terms.

    Parameters
    ----------
    flow
        The backmapper, in the batch's precision.
    batch
        ``positions`` (n, n_atoms, 3) and ``weight`` (n,); ``forces`` in kT/Å for the force terms,
        ``bead_force`` in kT/Å for the label, ``excess_energy`` (U - F)/kT for the energy term.
    terms
        Weights of the terms.
    """
    weight, beads = batch["weight"], flow.cg_map.apply(batch["positions"])
    noise, log_p, log_dx = flow.to_noise_terms(flow.points_from(beads, batch["positions"]))
    log_q = log_p.sum((-1, -2)) - log_dx.sum(-1)
    values = {"likelihood": -(weight * log_q).mean() / flow.n_dof}
    bounded = weight.clamp_max(1.0)  # terms that vanish frame by frame need no unbiased average
    if terms.energy:
        log_w = -batch["excess_energy"] - log_q
        log_w = log_w - (bounded * log_w).sum().detach() / bounded.sum()
        huber = nn.functional.huber_loss(
            log_w, torch.zeros_like(log_w), reduction="none", delta=_HUBER_KT
        )
        values["energy"] = (bounded * huber).mean() / flow.n_dof
    if terms.needs_forces:
        origin = beads.detach().requires_grad_()
        points, log_q_placed = flow.from_noise(origin, noise)
        work = (points[:, flow.point_of_atom] * batch["forces"]).sum()
        noise_force, label = torch.autograd.grad(
            work - log_q_placed.sum(), [noise, origin], create_graph=True
        )
        # On a rotor's barrier the noise force grows as 1/p: measure it along the angle there.
        density = torch.exp(log_p.detach() + _LOG_2PI).clamp_max(1.0)
        noise_force = torch.where(flow.rotor_dof, noise_force * density, noise_force)
        values["noise_force"] = (bounded * noise_force.square().mean((-1, -2))).mean()
        scatter = (label - batch["bead_force"]).square().mean((-1, -2))
        values["label"] = (bounded * scatter).mean()
    loss = sum(getattr(terms, name) * value for name, value in values.items())
    return loss, {name: float(value.detach()) for name, value in values.items()}


@contextmanager
def _fixed_order() -> Iterator[None]:
    """Add gradients in a fixed order, whatever the number of threads.

    Otherwise the gradient of an indexed tensor is summed by whichever thread comes first, and two
    runs of one seed part ways after a few steps.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@_fixed_order()
def fit_flow(
    flow: Backmapper,
    frames: FlowFrames,
    *,
    terms: FlowLoss,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    clip: float = 1.0,
    averaging: float = 0.998,
    progress: ProgressCallback | None = None,
) -> list[dict[str, float]]:
    """Fit ``flow`` in place; its parameters become the exponential average of the trajectory.

    Parameters
    ----------
    flow
        The backmapper; trained in single precision, left in double.
    frames
        What to learn from; forces, energies and bead forces as the terms need them.
    terms
        The loss.
    steps, batch_size, learning_rate, clip, averaging
        Of AdamW with a one-cycle schedule, gradient-norm clipping and weight averaging.
    seed
        Fixes batches and relabelling: the same seed gives the same parameters.
    progress
        Called as ``progress(step, steps, values)`` after every step.

    Returns
    -------
    list of dict
        The mean of each term over every twentieth of the run.

    Raises
    ------
    ValueError
        If the frames lack what a term needs.
    FloatingPointError
        If the loss stops being finite.
    """
    _check_frames(frames, terms)
    batches = _Batches(flow, frames, np.random.default_rng(seed))
    model = copy.deepcopy(flow).float().train()
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(steps, 2), pct_start=min(0.1, 100 / max(steps, 2))
    )
    history: list[dict[str, float]] = []
    window: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        loss, values = flow_loss(model, batches.draw(batch_size), terms)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the flow's loss is {loss.item()} at step {step}: lower the learning rate "
                f"(now {learning_rate:g}) or look for broken frames with 'ccg check'"
            )
        if not torch.isfinite(norm):
            optimizer.zero_grad()  # a step without gradients changes nothing
        optimizer.step()
        schedule.step()
        decay = min(averaging, step / (step + 10.0))
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 1.0 - decay)
        window.append(values)
        if step % max(1, steps // 20) == 0:
            history.append({k: float(np.mean([w[k] for w in window])) for k in values})
            window = []
        if progress is not None:
            progress(step, steps, values)
    flow.load_state_dict(average.double().state_dict())
    return history


def _check_frames(frames: FlowFrames, terms: FlowLoss) -> None:
    needs = {
        "forces": terms.needs_forces,
        "bead_force": terms.needs_forces,
        "energy": terms.energy > 0,
        "free_energy": terms.energy > 0,
    }
    missing = [name for name, needed in needs.items() if needed and getattr(frames, name) is None]
    if missing:
        raise ValueError(
            f"the loss {terms} needs {' and '.join(missing)} of the frames: give them, or set the "
            "weights of those terms to zero"
        )


@torch.no_grad()
def mean_nll(flow: Backmapper, positions: np.ndarray, batch_size: int = 2000) -> float:
    """Return the mean of -ln q(x|s) over frames (n, n_atoms, 3)."""
    total = 0.0
    for start in range(0, len(positions), batch_size):
        x = torch.from_numpy(positions[start : start + batch_size])
        _, log_q = flow.to_noise(flow.points_from(flow.cg_map.apply(x), x))
        total -= float(log_q.sum())
    return total / len(positions)

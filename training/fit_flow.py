"""Fitting the flow: likelihood first, then the forces and energies that the frames already carry.

The terms are in :mod:`.flow_losses` and :mod:`.own_samples`; here is the loop: AdamW with a
one-cycle schedule, averaged weights, early stopping on held-out frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ccg_ase.devices import device_of
from ccg_mda.flow import Backmapper

from .distributed import Ranks, together
from .flow_frames import Batches, FlowFrames, relabellings
from .flow_losses import (
    LIKELIHOOD_ONLY,
    NAMED_LOSSES,
    FlowLoss,
    flow_loss,
    without_free_energy,
)
from .own_samples import OwnSamples, OwnStates, own_sample_loss
from .trained import Trained, fixed_order

__all__ = [
    "LIKELIHOOD_ONLY",
    "NAMED_LOSSES",
    "FlowFit",
    "FlowFrames",
    "FlowLoss",
    "OwnSamples",
    "ProgressCallback",
    "fit_flow",
    "flow_loss",
    "frame_nll",
    "mean_nll",
    "relabellings",
    "without_free_energy",
]

ProgressCallback = Callable[[int, int, dict[str, float]], None]

_HELD_OUT_FRAMES = 1000  # more don't change which step is best: the same frames judge all steps


@dataclass
class FlowFit:
    """What a fit did.

    Attributes
    ----------
    history
        Mean of each term and of the ``loss`` over every twentieth of the run, with its last
        ``step``; and of the averaged weights on held-out frames ``held_out``, their loss, and
        ``nll``, the mean -ln q.
    steps, best_step
        Steps taken, and the one whose averaged weights the flow has.
    stopped_early
        True if the held-out frames ended the fit.
    energy_calls
        Calls of the potential spent on own samples.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    best_step: int = 0
    stopped_early: bool = False
    energy_calls: int = 0

    def __str__(self) -> str:
        end = "stopped early" if self.stopped_early else "ran to the end"
        calls = f", {self.energy_calls} energy calls" if self.energy_calls else ""
        return f"{end} at step {self.steps}, kept the weights of step {self.best_step}{calls}"


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
    held_out: FlowFrames | None = None,
    patience: int = 5,
    own: OwnSamples | None = None,
    free_energy: nn.Module | None = None,
    anchor: Callable[[nn.Module], Tensor] | None = None,
    progress: ProgressCallback | None = None,
) -> FlowFit:
    """Fit ``flow`` in place; its parameters become an exponential average of the trajectory.

    Parameters
    ----------
    flow
        The backmapper; trained in single precision, left in double.
    frames
        What to learn from; forces, energies and bead forces as the terms need them.
    terms
        The loss, e.g. ``FlowLoss.named("forces+energy")``.
    steps, batch_size, learning_rate, clip, averaging
        Of AdamW with a one-cycle schedule, gradient-norm clipping and weight averaging.
    seed
        Fixes batches, relabelling and own samples: the same seed gives the same parameters.
    held_out, patience
        Frames that carry what `frames` carry. Every twentieth of the run, their loss (of the terms
        on frames; the likelihood if there are none) decides which averaged weights are kept.
        The fit stops when it hasn't improved this many times in a row while the loss of `frames`
        has: both grow for a while at a high learning rate, which isn't overfitting. The start
        doesn't compete. Default: keep the last.
    own
        How own samples are drawn; needed by ``log_variance``, ``reverse_kl`` and ``weighted_kl``.
    free_energy
        Model of F(s) in eV, e.g. a `ForceField`, that learns along, in place, where the frames
        have no bead force or free energy (joint force matching). A third of ``steps`` more, at the
        start and each a third as dear, fit it alone to the labels of the flow as it is; otherwise
        the mean force would swamp the scatter.
    anchor
        What else that model is fitted to: a loss of it, drawn afresh at every step
        (`fit_joint.fit_joint`). Then the model counts as fitted, and isn't fitted alone first.
    progress
        Called as ``progress(step, steps, values)`` after every step.

    Raises
    ------
    ValueError
        If frames, own samples or the free-energy model lack what a term needs.
    FloatingPointError
        If the loss stops being finite.
    """
    return together(
        _fit,
        flow,
        frames,
        terms,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        clip=clip,
        averaging=averaging,
        held_out=held_out,
        patience=patience,
        own=own,
        free_energy=free_energy,
        anchor=anchor,
        leading={"progress": progress},
    )


@fixed_order()
def _fit(
    ranks: Ranks,
    flow: Backmapper,
    frames: FlowFrames,
    terms: FlowLoss,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    clip: float,
    averaging: float,
    held_out: FlowFrames | None,
    patience: int,
    own: OwnSamples | None,
    free_energy: nn.Module | None,
    anchor: Callable[[nn.Module], Tensor] | None,
    progress: ProgressCallback | None = None,
) -> FlowFit:
    """Do `fit_flow`: all processes draw the same batches, and each takes its share of them."""
    for each in (frames,) if held_out is None else (frames, held_out):
        _check(each, terms, own, free_energy)
    rng = np.random.default_rng(seed)
    batches = Batches(flow, frames, rng)
    states = OwnStates(flow, frames, own, rng) if own is not None and terms.needs_samples else None
    judge = None if held_out is None else _Judge(flow, held_out, terms)
    calls = own.potential.n_calls if states is not None else 0
    of_flow = Trained(flow, learning_rate, steps)
    trained, model = [of_flow], None
    if free_energy is not None:
        alone = steps // 3 if anchor is None else 0
        of_model = Trained(free_energy, learning_rate, alone + steps)
        trained, model = [*trained, of_model], of_model.module
        _fit_to_labels(ranks, of_flow.module, of_model, batches, batch_size, alone)

    result, window, best = FlowFit(), [], {}
    for step in range(1, steps + 1):
        loss, values = _of_share(ranks, of_flow.module, batches.draw(batch_size), terms, model)
        if states is not None:
            noise = flow.sample_noise(rng, (own.n_states, own.n_samples))
            part = ranks.share(own.n_states)
            drawn = {name: value[part] for name, value in states.draw().items()}
            more = own_sample_loss(of_flow.module, drawn, noise[part], own, terms, ranks)
            loss, values = loss + more[0], values | more[1]
        if anchor is not None:
            held = anchor(model) / ranks.size  # summed over the processes it counts once
            loss, values = loss + held, values | {"anchor": held.item()}
        loss.backward(inputs=[p for each in trained for p in each.parameters])
        values = _summed(ranks, values | {"loss": loss.item()})
        _check_finite(values["loss"], step, learning_rate)
        for each in trained:
            ranks.add_gradients(each.parameters)
            each.step(clip, min(averaging, step / (step + 10.0)))
        result.steps = step
        window.append(values)
        if progress is not None:
            progress(step, steps, {k: v for k, v in values.items() if k != "loss"})
        if step % max(1, steps // 20) and step < steps:
            continue
        record = {k: float(np.mean([w[k] for w in window])) for k in window[0]} | {"step": step}
        window = []
        result.history.append(record)
        if judge is None:
            result.best_step = step
            continue
        record |= ranks.agreed(judge(*(each.averaged for each in trained)))
        if not best or record["held_out"] < best["held_out"]:
            best, result.best_step = record, step
            for each in trained:
                each.keep()
        waited = sum(r["step"] > best["step"] for r in result.history)
        if waited >= patience and record["loss"] < best["loss"] and step < steps:
            result.stopped_early = True
            break
    for each in trained:
        each.restore()
    if states is not None:
        spent = _summed(ranks, {"calls": own.potential.n_calls - calls})
        result.energy_calls = round(spent["calls"])
    return result


def _of_share(
    ranks: Ranks,
    flow: Backmapper,
    batch: dict[str, Tensor],
    terms: FlowLoss,
    free_energy: nn.Module | None,
) -> tuple[Tensor, dict[str, float]]:
    """Return this process's part of `flow_loss`: their sum is that of the batch."""
    size = len(batch["weight"])
    part = ranks.share(size)
    own = {name: value[part] for name, value in batch.items()}
    loss, values = flow_loss(flow, own, terms, free_energy, ranks)
    fraction = len(own["weight"]) / size
    return loss * fraction, {name: value * fraction for name, value in values.items()}


def _summed(ranks: Ranks, values: dict[str, float]) -> dict[str, float]:
    """Return the sums of values over the processes."""
    total = ranks.sum(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, total.tolist(), strict=True))


class _Judge:
    """The loss on held-out frames, evenly chosen, always the same ones and as they are."""

    def __init__(self, flow: Backmapper, held_out: FlowFrames, terms: FlowLoss) -> None:
        some = held_out[:: -(-len(held_out) // _HELD_OUT_FRAMES)]
        batches = Batches(flow, some, np.random.default_rng())
        self._batches = list(batches.in_order(250))
        on_frames = terms.likelihood or terms.needs_forces or terms.energy
        self._terms = terms if on_frames else LIKELIHOOD_ONLY

    def __call__(self, flow: Backmapper, free_energy: nn.Module | None = None) -> dict[str, float]:
        share = [len(batch["weight"]) for batch in self._batches]
        found = [flow_loss(flow, batch, self._terms, free_energy) for batch in self._batches]
        nll = np.average([values["likelihood"] for _, values in found], weights=share)
        loss = np.average([loss.item() for loss, _ in found], weights=share)
        return {"held_out": float(loss), "nll": float(nll) * flow.n_dof}


def _fit_to_labels(
    ranks: Ranks, flow: nn.Module, of_model: Trained, batches: Batches, batch_size: int, steps: int
) -> None:
    """Fit a free-energy model alone to the pulled-back labels of a flow."""
    only_label = FlowLoss(likelihood=0.0, noise_force=0.0, label=1.0, energy=0.0)
    flow.requires_grad_(False)
    for step in range(1, steps + 1):
        batch = batches.draw(batch_size)
        loss, _ = _of_share(ranks, flow, batch, only_label, of_model.module)
        loss.backward()
        ranks.add_gradients(of_model.parameters)
        of_model.step(float("inf"), step / (step + 10.0))
    flow.requires_grad_(True)


def _check_finite(loss: float, step: int, learning_rate: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the flow's loss is {loss} at step {step}: lower the learning rate "
            f"(now {learning_rate:g}) or look for broken frames with 'ccg check'"
        )


def _check(
    frames: FlowFrames,
    terms: FlowLoss,
    own: OwnSamples | None,
    free_energy: nn.Module | None,
) -> None:
    needs = {
        "forces": terms.needs_forces,
        "bead_force": terms.label > 0 and free_energy is None,
        "energy": terms.energy > 0,
        "free_energy": terms.energy > 0 and free_energy is None,
    }
    missing = [name for name, needed in needs.items() if needed and getattr(frames, name) is None]
    if missing:
        raise ValueError(
            f"the loss {terms} needs {' and '.join(missing)} of the frames: give them, or set the "
            "weights of those terms to zero"
        )
    if terms.needs_samples and own is None:
        raise ValueError(
            f"the loss {terms} needs samples of the flow: give own=OwnSamples(potential), or set "
            "the weights of those terms to zero"
        )
    if free_energy is not None and frames.temperature_K is not None:
        raise ValueError(
            "a free-energy model holds at one temperature, but the frames have several: give "
            "bead_force and free_energy with the frames instead of free_energy="
        )


@torch.no_grad()
def frame_nll(
    flow: Backmapper, positions: np.ndarray, batch_size: int = 2000, **conditions: np.ndarray
) -> np.ndarray:
    """Return -ln q(x|s) of frames, (n,), in the flow's precision.

    Parameters
    ----------
    flow, positions
        The backmapper, and frames (n, n_atoms, 3) in Å.
    batch_size
        Frames per pass.
    **conditions
        ``temperature_K`` (n,) and ``box`` (n, 3, 3) of the frames, if the flow is conditioned on
        them.
    """
    place = {"device": device_of(flow), "dtype": next(flow.parameters()).dtype}
    centred = positions - positions.mean(1, keepdims=True)
    parts = []
    for start in range(0, len(positions), batch_size):
        part = slice(start, start + batch_size)
        x = torch.from_numpy(centred[part]).to(**place)
        given = {
            k: torch.from_numpy(np.asarray(a[part])).to(**place) for k, a in conditions.items()
        }
        parts.append(-flow.to_noise_terms(x, flow.cg_map.apply(x), **given)[2].double())
    return torch.cat(parts).cpu().numpy()


def mean_nll(flow: Backmapper, positions: np.ndarray, **options: Any) -> float:
    """Return the mean of `frame_nll`."""
    return float(frame_nll(flow, positions, **options).mean())

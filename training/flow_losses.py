"""What a flow is fitted to: the terms of its loss on frames, and mixtures of them by name.

On a frame (x, s) with stored force and energy, after `flow_recipe.md`; ln w = -U/kT - ln q:

- ``likelihood``   -ln q(x|s): forward KL.
- ``noise_force``  |∇_z ln w|² at x(z, s), in the noise z: zero everywhere if q is exact.
- ``label``        |f - f(s)|², the scatter of the pulled-back label f = kT ∇_s ln w at fixed noise
  around the bead force: zero everywhere if q and the bead force are exact.
- ``energy``       (ln w + F(s)/kT - c)², Huber: zero everywhere if both models are exact.
- ``coordinate_force``  the same as ``noise_force``, but along each internal coordinate, in units of
  its width: zero where that is, at a third of its cost, since no pass through the generations is
  needed.

The noise is a function of x *with its graph*: detached, x would move with the parameters while its
force stays behind. The terms on the flow's own samples are in :mod:`.own_samples`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ccg_ase.units import thermal_energy
from ccg_mda.flow import Backmapper

from .distributed import ALONE, Ranks
from .flow_frames import conditions

_HUBER_KT = 4.0  # residuals of ln w beyond this count linearly
_OUTLIER = 30.0  # medians of a batch beyond which the square of a frame's force is capped
_LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True)
class FlowLoss:
    """Weights of the terms of the loss; the defaults are those of `flow_recipe.md`, run FB.

    Attributes
    ----------
    likelihood, noise_force, label, energy, coordinate_force
        On frames. The likelihood and the energy count per degree of freedom.
    log_variance, reverse_kl, weighted_kl
        On own samples, per degree of freedom. Near q = p, weights of 1/2, 1 and 1 give the same
        expected gradient.
    """

    likelihood: float = 1.0
    noise_force: float = 2.0
    label: float = 0.03
    energy: float = 10.0
    coordinate_force: float = 0.0
    log_variance: float = 0.0
    reverse_kl: float = 0.0
    weighted_kl: float = 0.0

    @property
    def needs_forces(self) -> bool:
        """True if any term compares with the forces on the atoms."""
        return bool(self.noise_force or self.coordinate_force or self.label)

    @property
    def needs_samples(self) -> bool:
        """True if any term spends energy calls on samples of the flow."""
        return bool(self.log_variance or self.reverse_kl or self.weighted_kl)

    @classmethod
    def named(cls, name: str) -> FlowLoss:
        """Return a tested mixture; the names are those of `NAMED_LOSSES`.

        Raises
        ------
        ValueError
            If there is no such mixture.
        """
        if name not in NAMED_LOSSES:
            raise ValueError(f"no flow loss is named {name!r}: choose {', '.join(NAMED_LOSSES)}")
        return NAMED_LOSSES[name]


LIKELIHOOD_ONLY = FlowLoss(noise_force=0.0, label=0.0, energy=0.0)
NAMED_LOSSES = {
    "likelihood": LIKELIHOOD_ONLY,
    "energy": FlowLoss(noise_force=0.0, label=0.0),
    "noise_force": FlowLoss(label=0.0, energy=0.0),
    "label": FlowLoss(noise_force=0.0, energy=0.0),
    "forces": FlowLoss(energy=0.0),
    "forces+energy": FlowLoss(),
    "coordinate_force": FlowLoss(noise_force=0.0, label=0.0, energy=0.0, coordinate_force=2.0),
    "log_variance": FlowLoss(noise_force=0.0, label=0.0, energy=0.0, log_variance=0.5),
    "reverse_kl": FlowLoss(noise_force=0.0, label=0.0, energy=0.0, reverse_kl=1.0),
    "weighted_kl": FlowLoss(noise_force=0.0, label=0.0, energy=0.0, weighted_kl=1.0),
    "forces+log_variance": FlowLoss(log_variance=0.5),
    "forces+reverse_kl": FlowLoss(reverse_kl=1.0),
    "forces+weighted_kl": FlowLoss(weighted_kl=1.0),
}


def without_free_energy(terms: FlowLoss) -> FlowLoss:
    """Return a mixture less the terms that need a force or a free energy of the beads."""
    return replace(terms, label=0.0, energy=0.0)


def _capped(square: Tensor, ranks: Ranks) -> Tensor:
    """Return squares (n,), those far above most others capped; their gradient is of a logarithm.

    In a frame that the flow doesn't know yet, forces are as large as those of a clash; a few such
    frames would decide the step, though only the likelihood can teach the flow to know them.
    """
    value = square.detach()
    median = ranks.gather(value).median()
    return square * (_OUTLIER * median / value.clamp_min(1e-30)).clamp_max(1.0)


def _centre(values: Tensor, weight: Tensor, ranks: Ranks) -> Tensor:
    """Return the weighted mean (), values far from the median drawn in: one clash moves it little.

    The first step of Huber's estimate of location; the mean itself where nothing is far.
    """
    median = ranks.gather(values).median()
    near = values.clamp(median - _HUBER_KT, median + _HUBER_KT)
    mean, weights = ranks.sum(torch.stack([(weight * near).sum(), weight.sum()]))
    return mean / weights


def total(terms: FlowLoss, values: dict[str, Tensor]) -> Tensor:
    """Return the weighted sum of some terms."""
    return sum(getattr(terms, name) * value for name, value in values.items())


def flow_loss(
    flow: Backmapper,
    batch: dict[str, Tensor],
    terms: FlowLoss,
    free_energy: nn.Module | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a batch and the value of each of its terms.

    Parameters
    ----------
    flow
        The backmapper, in the batch's precision.
    batch
        ``positions`` (n, n_atoms, 3) and ``weight`` (n,); ``forces`` in kT/Å for the force terms;
        ``bead_force`` in kT/Å for the label; ``excess_energy`` (U - F)/kT for the energy term, or
        ``energy`` U/kT. ``temperature_K`` (n,) and ``box`` (n, 3, 3) if the flow is conditioned
        on them.
    terms
        Weights of the terms.
    free_energy
        Model of F(s) in eV, called with the coarse variables: stands in for ``bead_force`` and F
        where the batch lacks them, and learns along (theory 5.4).
    ranks
        Processes that hold the other parts of the batch: medians and constants are those of the
        whole; the loss is the mean over this part.
    """
    weight, given = batch["weight"], conditions(batch)
    positions = batch["positions"]
    coarse = flow.cg_map.apply(positions)
    if terms.coordinate_force:
        positions = positions.clone().requires_grad_()
    noise, log_p, log_q = flow.to_noise_terms(positions, coarse, **given)
    values = {"likelihood": -(weight * log_q).mean() / flow.n_dof}
    bounded = weight.clamp_max(1.0)  # terms that vanish frame by frame need no unbiased average
    origin = coarse.detach().requires_grad_()
    modelled = None
    if free_energy is not None:
        modelled = free_energy(origin) / thermal_energy(flow.temperature_K)
    if terms.energy:
        excess = batch["excess_energy"] if "excess_energy" in batch else batch["energy"] - modelled
        log_w = -excess - log_q
        log_w = log_w - _centre(log_w.detach(), bounded, ranks)
        huber = nn.functional.huber_loss(
            log_w, torch.zeros_like(log_w), reduction="none", delta=_HUBER_KT
        )
        values["energy"] = (bounded * huber).mean() / flow.n_dof
    found = {}
    if terms.noise_force or terms.label:
        found["noise_force"], found["label"] = _along_noise(
            flow, noise, origin, batch["forces"], given
        )
    if terms.coordinate_force:
        found["coordinate_force"] = _along_coordinates(
            flow, positions, coarse, noise, log_p, log_q, batch["forces"]
        )
    bead_force = batch.get("bead_force")
    if terms.label and bead_force is None:
        (slope,) = torch.autograd.grad(modelled.sum(), origin, create_graph=True)
        bead_force = -slope
    for name, force in found.items():
        if not getattr(terms, name):
            continue
        if name == "label":
            square = (force - bead_force).square().flatten(1).mean(1)
        else:
            # On a rotor's barrier the noise force grows as 1/p: measure it along the angle there.
            density = torch.exp(log_p.detach() + _LOG_2PI).clamp_max(1.0)
            force = torch.where(flow.rotor_dof, force * density, force) * flow.active
            square = force.square().sum((-1, -2)) / flow.n_dof
        values[name] = (bounded * _capped(square, ranks)).mean()
    loss = total(terms, values)
    return loss, {name: float(value.detach()) for name, value in values.items()}


def _along_noise(
    flow: Backmapper,
    noise: Tensor,
    origin: Tensor,
    forces: Tensor,
    given: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ln w along the noise and, at fixed noise, along s."""
    learns = noise.requires_grad
    noise = noise if learns else noise.requires_grad_()
    positions, log_q = flow.from_noise(origin, noise, **given)
    work = (positions * forces).sum()
    return torch.autograd.grad(work - log_q.sum(), [noise, origin], create_graph=learns)


def _along_coordinates(
    flow: Backmapper,
    positions: Tensor,
    coarse: Tensor,
    noise: Tensor,
    log_p: Tensor,
    log_q: Tensor,
    forces: Tensor,
) -> Tensor:
    """Return the gradient of ln w along internal coordinates.

    With x = x(y, s) of internal coordinates y, a map without parameters: ∇_y ln w = (∂x/∂y)ᵀ g,
    g = -∇U/kT - ∇_x ln q(x|s), scaled by the width |∂y/∂z| of each coordinate.
    """
    (g,) = torch.autograd.grad(log_q.sum(), [positions], create_graph=True)
    y = flow.internal_coordinates(positions.detach(), coarse).requires_grad_()
    normal = -0.5 * (noise.square() + _LOG_2PI)
    width = torch.exp(torch.where(flow.rotor_dof, -_LOG_2PI, normal) - log_p)
    work = (flow.place_atoms(y, coarse) * (forces - g)).sum()
    return torch.autograd.grad(work, [y], create_graph=True)[0] * width

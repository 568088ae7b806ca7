r"""Terms of the loss on the flow's own samples, K of them at each of some states s (theory 5.3).

With l = -U/kT - ln q, U capped (here only, never in reported weights), per degree of freedom:

- ``log_variance``  variance of l over the samples of a state, samples fixed. Its gradient is on
  the average twice that of the reverse KL; it vanishes sample by sample at q = p.
- ``reverse_kl``    KL(q|p) by its path gradient -∂l/∂x · ∂x/∂θ: the score -∂ln q/∂θ at fixed x,
  zero on the average and all noise, is left out. It vanishes sample by sample at q = p.
- ``weighted_kl``   -Σ_k (w̄_k - 1/K) ln q(x_k|s): forward KL towards p^β q^(1-β), with β per state
  the largest exponent up to one that stays in the trust region. The 1/K, a control variate of
  mean zero, removes the noise of equal weights.

A sample's forces and energy come from one call of the potential.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ccg_ase.devices import device_of
from ccg_ase.units import thermal_energy
from ccg_mda.flow import Backmapper
from ccg_mda.potential import Potential

from .distributed import ALONE, Ranks
from .flow_frames import FlowFrames, conditions, given_conditions
from .flow_losses import FlowLoss, total

_LARGEST_KT = 1e9  # stands for an infinite energy inside the cap's logarithm


@dataclass(frozen=True, eq=False)
class OwnSamples:
    """How the flow's own samples are drawn and judged.

    Attributes
    ----------
    potential
        Atomistic energies and forces.
    coarse
        States to draw from, (n, n_beads, 3) in Å or (n, n_torsions) in rad; default: those of the
        frames.
    jitter
        Standard deviation of Gaussian noise on the states, in their unit.
    n_states, n_samples
        States per step and samples at each: their product is the calls per step.
    cap_kT
        Energies this far above the lowest tenth of their state grow logarithmically from there.
    min_ess, max_kl
        Trust region of ``weighted_kl``: least effective sample size (fraction) and largest KL, in
        nats, of the tempered weights.
    """

    potential: Potential
    coarse: np.ndarray | None = None
    jitter: float = 0.0
    n_states: int = 16
    n_samples: int = 16
    cap_kT: float = 50.0
    min_ess: float = 0.5
    max_kl: float = 0.5

    def __post_init__(self) -> None:
        if self.n_samples < 2 or not 0 < self.min_ess < 1 or self.max_kl <= 0:
            raise ValueError(
                f"own samples need n_samples >= 2, 0 < min_ess < 1 and max_kl > 0; got "
                f"{self.n_samples}, {self.min_ess} and {self.max_kl}"
            )


class OwnStates:
    """Draws the states of a flow's own samples, in single precision and centred.

    Temperatures and boxes, for a flow that is conditioned on them, are those of the frames; with
    states of their own, they are drawn independently.
    """

    def __init__(
        self, flow: Backmapper, frames: FlowFrames, own: OwnSamples, rng: np.random.Generator
    ) -> None:
        self._conditions, self._own, self._rng = given_conditions(frames), own, rng
        self._together, self._n_frames = own.coarse is None, len(frames)
        self._device = device_of(flow)
        self._coarse = flow.cg_map.apply(frames.positions) if self._together else own.coarse

    def draw(self) -> dict[str, Tensor]:
        """Return ``coarse`` (n_states, ...), and the conditions that the frames have."""
        size = self._own.n_states
        chosen = self._rng.integers(0, len(self._coarse), size)
        coarse = np.asarray(self._coarse[chosen], float)
        if coarse.ndim == 3:  # beads; torsions have no origin
            coarse = coarse - coarse.mean(1, keepdims=True)
        arrays = {"coarse": coarse + self._own.jitter * self._rng.standard_normal(coarse.shape)}
        if not self._together:
            chosen = self._rng.integers(0, self._n_frames, size)
        arrays |= {name: array[chosen] for name, array in self._conditions.items()}
        return {
            k: torch.from_numpy(np.asarray(a, np.float32)).to(self._device)
            for k, a in arrays.items()
        }


def capped(excess: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Return energies of linear-logarithmic growth, e or cap + ln(1 + e - cap), and their slope."""
    above = (excess - cap).clamp(0.0, _LARGEST_KT)
    return excess.clamp_max(cap) + torch.log1p(above), 1.0 / (1.0 + above)


def tempered_weights(
    log_weight: Tensor, min_ess: float, max_kl: float = float("inf")
) -> tuple[Tensor, Tensor]:
    """Return weights w̄ ∝ exp(β l) over the last axis, with the largest β <= 1 in a trust region.

    Effective sample size falls and KL(w̄ | uniform) grows monotonically with β, so β is bisected.

    Parameters
    ----------
    log_weight
        l, shape (S, K), finite.
    min_ess, max_kl
        Least effective sample size 1/(K Σ w̄²) and largest Σ w̄ ln(K w̄), in nats.

    Returns
    -------
    weights, exponent
        Shapes (S, K) and (S,).
    """
    n = log_weight.shape[-1]

    def weights(beta: Tensor) -> Tensor:
        return torch.softmax(beta[..., None] * log_weight, -1)

    def trusted(beta: Tensor) -> Tensor:
        w = weights(beta)
        kl = torch.special.entr(w).sum(-1).neg() + np.log(n)
        return (1.0 / (n * w.square().sum(-1)) >= min_ess) & (kl <= max_kl)

    high = torch.ones_like(log_weight[..., 0])
    low = torch.where(trusted(high), high, torch.zeros_like(high))
    for _ in range(40):
        middle = 0.5 * (low + high)
        good = trusted(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return weights(low), low


def own_sample_loss(
    flow: Backmapper,
    batch: dict[str, Tensor],
    noise: Tensor,
    own: OwnSamples,
    terms: FlowLoss,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of own samples at a batch of states, and the value of each term.

    Parameters
    ----------
    flow
        The backmapper, in the batch's precision.
    batch
        ``coarse`` (S, ...); ``temperature_K`` (S,) and ``box`` (S, 3, 3) if the flow is conditioned
        on them.
    noise
        Base noise (S, K, n_dof), as of `Backmapper.sample_noise`.
    own
        The potential, cap and trust region.
    terms
        Weights of the terms.
    ranks
        Processes that hold the other states; the loss is this one's part of a sum.
    """
    n_states, n_samples = noise.shape[:2]
    batch = {name: value.repeat_interleave(n_samples, 0) for name, value in batch.items()}
    coarse, given = batch["coarse"], conditions(batch)
    slots = flow.by_slot(noise.flatten(0, 1)).to(coarse)
    with torch.set_grad_enabled(bool(terms.reverse_kl)):
        placed, _ = flow.from_noise(coarse, slots, **given)
    x = placed.detach().requires_grad_(bool(terms.reverse_kl))
    temperature = batch.get("temperature_K", x.new_full((), flow.temperature_K))
    kt = thermal_energy(1.0) * temperature.double()
    energy, forces = (
        torch.from_numpy(np.asarray(a, np.float64)).to(x.device)
        for a in own.potential(x.detach().double().cpu().numpy())
    )
    excess, slope, alive = _excess(energy / kt, n_states, own.cap_kT)
    _, _, log_q = flow.to_noise_terms(x, coarse, **given)
    log_w = (-excess.to(log_q) - log_q).view(n_states, n_samples)
    share = alive.to(log_q) / (ranks.sum(alive.sum()).clamp(min=1) * flow.n_dof)

    values = {}
    if terms.log_variance:
        values["log_variance"] = (share * log_w.var(1)).sum()
    if terms.weighted_kl:
        weights, _ = tempered_weights(log_w.detach(), own.min_ess, own.max_kl)
        surplus = (weights - 1.0 / n_samples) * log_q.view_as(weights)
        values["weighted_kl"] = -(share * surplus.sum(1)).sum()
    if terms.reverse_kl:
        (gradient,) = torch.autograd.grad(log_q.sum(), x, retain_graph=True)
        pull = -(slope / kt)[:, None, None] * forces
        path = ((pull.to(x) + gradient) * placed).sum((-1, -2)).view(n_states, n_samples).mean(1)
        log_z = torch.logsumexp(log_w, 1) - np.log(n_samples)
        estimate = (log_z - log_w.mean(1)).detach()
        values["reverse_kl"] = (share * (estimate + path - path.detach())).sum()
    return total(terms, values), {name: float(v.detach()) for name, v in values.items()}


def _excess(energy: Tensor, n_states: int, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cap U/kT above the lowest tenth of each state; a state of clashes only doesn't count.

    The median may be that of clashes itself, where a flow is new to a state.

    Returns the capped excess and its slope, (S K,), and which states count, (S,).
    """
    by_state = energy.view(n_states, -1)
    finite = by_state.where(by_state.isfinite(), torch.nan)
    low = finite.nanquantile(0.1, dim=1, keepdim=True)
    alive = low.isfinite()
    excess = torch.where(alive, by_state - low, torch.zeros_like(by_state))
    excess, slope = capped(excess.clamp_max(_LARGEST_KT), cap)
    return excess.flatten(), slope.flatten(), alive[:, 0]

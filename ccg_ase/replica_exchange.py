"""ReplicaExchange: walkers of a batch pass between temperatures, decided on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccg_ase.baoab import BAOAB, PhasePoint
from ccg_ase.forcefield import ForceField
from ccg_ase.units import KB_eV


def geometric_ladder(lowest_K: float, highest_K: float, n_rungs: int) -> np.ndarray:
    """Return temperatures of equal ratio in K, shape (n_rungs,).

    Equal ratios give equal acceptance where the heat capacity is constant (Kofke, J. Chem. Phys.
    117, 6911 (2002)).

    Raises
    ------
    ValueError
        If the temperatures aren't positive and ascending, or there are fewer than two rungs.
    """
    if not (0 < lowest_K < highest_K < np.inf and n_rungs >= 2):
        raise ValueError(
            f"a ladder needs two rungs or more from a lower to a higher temperature, got {n_rungs} "
            f"from {lowest_K} K to {highest_K} K"
        )
    return np.geomspace(lowest_K, highest_K, n_rungs)


def rung_temperatures(
    force_field: ForceField,
    temperature_K: float | None,
    temperatures_K: Sequence[float] | None,
    exchange_every: int | None,
) -> np.ndarray:
    """Return the temperatures in K of a ladder, or of replicas without exchange, shape (K,).

    Without exchange all must be temperatures of the force field; with it, at least one.

    Parameters
    ----------
    force_field
        The force field.
    temperature_K, temperatures_K, exchange_every
        As for `BatchedLangevin`.

    Raises
    ------
    ValueError
        If they contradict one another, or the force field doesn't hold at a temperature.
    """
    if temperature_K is not None and temperatures_K is not None:
        raise ValueError("give temperature_K or temperatures_K, not both")
    one = force_field.temperature_K if temperature_K is None else temperature_K
    rungs = np.array([one] if temperatures_K is None else temperatures_K, dtype=float)
    if rungs.ndim != 1 or not len(rungs) or not (np.isfinite(rungs) & (rungs > 0)).all():
        raise ValueError(f"temperatures must be positive numbers in a row, got {rungs.tolist()}")
    if exchange_every is None:
        force_field.temperatures_K.check(rungs)
        return rungs
    if exchange_every < 1 or len(rungs) < 2 or not (np.diff(rungs) > 0).all():
        raise ValueError(
            f"exchange needs temperatures_K that ascend, two or more, and at least one step; got "
            f"{rungs.tolist()} every {exchange_every}"
        )
    if not force_field.temperatures_K.holds(rungs).any():
        raise ValueError(
            f"no rung of the ladder {rungs.tolist()} is a temperature of the force field "
            f"({force_field.temperatures_K}), hence none a physical ensemble: let one be "
            f"{force_field.temperature_K} K"
        )
    return rungs


class ExchangeReport(NamedTuple):
    """How well walkers move.

    Parameters
    ----------
    attempts
        Exchanges attempted between rung k and k + 1, over all ladders, shape (K - 1,).
    acceptance
        The accepted fraction of them, NaN where none was attempted, shape (K - 1,).
    round_trips
        How often each walker went from the lowest rung to the highest and back, shape (R,).
    """

    attempts: np.ndarray
    acceptance: np.ndarray
    round_trips: np.ndarray


class ReplicaExchange:
    """Exchange of neighbouring temperatures, even and odd pairs by turns.

    Replica r is rung r % K of ladder r // K; rungs keep their temperature, walkers move. For rungs
    i and j with energies E_i and E_j (restraints included), which may differ, the exchange is
    accepted with probability min(1, exp(-Δ)),
    Δ = β_i [E_i(x_j) - E_i(x_i)] + β_j [E_j(x_i) - E_j(x_j)]
    (Fukunishi, Watanabe and Takada, J. Chem. Phys. 116, 9058 (2002)), one further evaluation per
    attempt. Velocities are scaled by √(T_new / T_old) (Sugita and Okamoto, Chem. Phys. Lett. 314,
    141 (1999)). Nothing is read back from the device.

    Parameters
    ----------
    temperatures_K
        Temperature of each replica in K, float64 (R,), on the device of the dynamics.
    n_rungs
        Rungs K of a ladder, a divisor of R.
    """

    def __init__(self, temperatures_K: Tensor, n_rungs: int):
        self._temperatures, self.n_rungs = temperatures_K, n_rungs
        self._beta = 1 / (KB_eV * temperatures_K)
        self._own = torch.arange(len(temperatures_K), device=temperatures_K.device)
        self._partners = [self._partner(parity) for parity in (0, 1)]
        self.walkers = self._own.clone()
        self._attempts = [0, 0]
        self._accepted = torch.zeros_like(self._own)  # with the next rung above
        self._from_top = torch.zeros_like(self._own, dtype=torch.bool)
        self._from_bottom = torch.zeros_like(self._from_top)
        self._round_trips = torch.zeros_like(self._own)
        self._visit_ends()

    def _partner(self, parity: int) -> Tensor:
        rung = self._own % self.n_rungs
        partner = self._own + torch.where(rung % 2 == parity, 1, -1)
        same_ladder = (partner >= 0) & (partner // self.n_rungs == self._own // self.n_rungs)
        return torch.where(same_ladder, partner, self._own)

    def attempt(
        self, number: int, point: PhasePoint, dynamics: BAOAB, log_uniforms: Tensor
    ) -> None:
        """Try all pairs of one parity and exchange walkers, in place.

        Parameters
        ----------
        number
            Counts the attempts; its parity is that of the lower rungs.
        point
            The replicas.
        dynamics
            What evaluates them.
        log_uniforms
            Logarithms of uniform random numbers, shape (R,).
        """
        partner = self._partners[number % 2]
        proposed = dynamics.at(point.beads[partner], point.velocities[partner])
        cost = self._beta * (
            (proposed.energies + proposed.restraint_energies)
            - (point.energies + point.restraint_energies)
        )
        lower = torch.minimum(self._own, partner)  # both of a pair take the same random number
        accepted = (log_uniforms[lower] < -(cost + cost[partner])) & (partner != self._own)
        source = torch.where(accepted, partner, self._own)
        scale = (self._temperatures / self._temperatures[source]).sqrt()
        point.beads = point.beads[source]
        point.velocities = point.velocities[source] * scale[:, None, None]
        vectors, sites = accepted[:, None, None], accepted[:, None]
        point.forces = torch.where(vectors, proposed.forces, point.forces)
        point.site_energies = torch.where(sites, proposed.site_energies, point.site_energies)
        point.restraint_energies = torch.where(
            accepted, proposed.restraint_energies, point.restraint_energies
        )
        self._attempts[number % 2] += 1
        self._accepted += accepted & (partner > self._own)
        for name in ("walkers", "_from_top", "_from_bottom", "_round_trips"):
            setattr(self, name, getattr(self, name)[source])
        self._visit_ends()

    def _visit_ends(self) -> None:
        """Count round trips of walkers that are back at the lowest rung, and mark both ends."""
        rung = self._own % self.n_rungs
        bottom, top = rung == 0, rung == self.n_rungs - 1
        self._round_trips += bottom & self._from_top
        self._from_top = torch.where(bottom, False, self._from_top | (top & self._from_bottom))
        self._from_bottom = torch.where(top, False, self._from_bottom | bottom)

    def report(self) -> ExchangeReport:
        """Return acceptance rates and round trips so far."""
        n_ladders = len(self._own) // self.n_rungs
        accepted = self._accepted.view(-1, self.n_rungs)[:, :-1].sum(0).cpu().numpy()
        attempts = np.array([self._attempts[k % 2] * n_ladders for k in range(self.n_rungs - 1)])
        acceptance = np.full(len(attempts), np.nan)
        np.divide(accepted, attempts, out=acceptance, where=attempts > 0)
        by_walker = torch.empty_like(self._round_trips)
        by_walker[self.walkers] = self._round_trips
        return ExchangeReport(attempts, acceptance, by_walker.cpu().numpy())

    _TENSORS = ("walkers", "_accepted", "_from_top", "_from_bottom", "_round_trips")

    def state_dict(self) -> dict[str, Tensor | list[int]]:
        """Return who is where and all counts: plain numbers and tensors on the CPU."""
        tensors = {name.lstrip("_"): getattr(self, name).cpu().clone() for name in self._TENSORS}
        return {"attempts": list(self._attempts), **tensors}

    def load_state_dict(self, state: dict[str, Tensor | list[int]]) -> None:
        """Continue from `state_dict`."""
        self._attempts = list(state["attempts"])
        for name in self._TENSORS:
            setattr(self, name, state[name.lstrip("_")].to(self._own.device, copy=True))

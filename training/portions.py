"""One portion of states, labelled from the first sample to the last remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from ccg_mda.bounds import Estimate
from ccg_mda.weights import effective_sample_size, pareto_k

from .annealed_samples import AnnealedSamples
from .annealing import PathTooLongError, anneal, tune_path
from .buffer import Buffer, thinned
from .estimators import Thermodynamics, label_variance, thermodynamics
from .gates import ACCEPT, ANNEAL, MORE, RESTRAIN, inflation, trusted, verdicts
from .labels import ANNEALED, PLAIN, RESTRAINED, Labels
from .reconstruction import reconstruct
from .reference import read_npz, write_npz
from .restrained_labels import Restraint, label_run
from .samples import Samples
from .thresholds import Gates

REFUSED, SKIPPED = "refused", "skipped"
CALLS = ("check", PLAIN, ANNEALED, RESTRAINED)
_TUNING = 16  # particles that find a path


class Portion(NamedTuple):
    """What is known of some states: see `labelling.Labelled`."""

    labels: Labels
    buffer: Buffer
    table: dict[str, np.ndarray]
    calls: dict[str, int]

    def save(self, path: Path) -> None:
        """Write an NPZ file, atomically."""
        groups = {"labels": vars(self.labels), "buffer": vars(self.buffer), "table": self.table}
        groups["calls"] = {kind: np.array(n) for kind, n in self.calls.items()}
        flat = {f"{g}.{name}": a for g, arrays in groups.items() for name, a in arrays.items()}
        write_npz(path, flat)

    @classmethod
    def load(cls, path: Path) -> Portion:
        """Read what `save` wrote."""
        groups: dict[str, dict[str, np.ndarray]] = {}
        for name, array in read_npz(path).items():
            group, column = name.split(".")
            groups.setdefault(group, {})[column] = array
        calls = {kind: int(n) for kind, n in groups["calls"].items()}
        return cls(Labels(**groups["labels"]), Buffer(**groups["buffer"]), groups["table"], calls)


class PortionLabeller:
    """Labels portions of states; see `labelling.label` for the parameters."""

    def __init__(
        self,
        backmapper: nn.Module,
        potential: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        n_samples: int,
        gates: Gates,
        restraint: Restraint | None,
        guess: Callable[[np.ndarray], np.ndarray] | None,
    ) -> None:
        self.backmapper, self.potential, self.n_samples = backmapper, potential, n_samples
        self.restraint, self.guess = restraint, guess or np.zeros_like
        if restraint is not None and restraint.calls_per_state < annealing_calls(n_samples, gates):
            gates = replace(gates, max_stages=0)  # the cheaper of both
        self.gates = gates

    def label(
        self,
        states: np.ndarray,
        failed: np.ndarray,
        max_calls: float,
        rng: np.random.Generator,
        path: Path,
    ) -> Portion:
        """Label states (S, ...), of which some failed the forward check, (S,) bool.

        ``path`` is where the portion will lie; restrained dynamics get a folder beside it.
        """
        work = _Work(self, states, max_calls, rng)
        work.plain(failed)
        work.annealed()
        work.restrained(path.with_suffix(""))
        return work.portion()


class _Work:
    """A portion while it is being labelled."""

    def __init__(
        self, tools: PortionLabeller, states: np.ndarray, max_calls: float, rng: np.random.Generator
    ) -> None:
        n = len(states)
        self.tools, self.states, self.left, self.rng = tools, states, max_calls, rng
        self.verdict = np.full(n, SKIPPED, dtype="<U10")
        names = ("ess", "pareto_k", "label_variance", "log_weight_variance")
        names += tuple(f"{name}{e}" for name in Thermodynamics._fields for e in ("", "_error"))
        self.columns = {name: np.full(n, np.nan) for name in names}
        self.n_plain, self.calls = np.zeros(n, dtype=int), dict.fromkeys(CALLS, 0)
        empty = np.zeros((0, *states.shape[1:]))
        self.labels = [Labels(empty, empty, np.zeros(0))]
        atoms = np.zeros((0, tools.backmapper.cg_map.n_atoms, 3))
        none = np.zeros(0)
        self.buffers = [Buffer(empty, atoms, atoms, none, none, none.astype(int), empty, none)]

    def portion(self) -> Portion:
        """Return the result; whatever is still waiting for a remedy is refused."""
        waiting = np.isin(self.verdict, (MORE, ANNEAL, RESTRAIN))
        self.verdict[waiting] = REFUSED
        table = self.columns | {"beads": self.states, "verdict": self.verdict}
        table["n_samples"] = self.n_plain
        labels, buffer = Labels.concatenate(*self.labels), Buffer.concatenate(*self.buffers)
        return Portion(labels, buffer, table, self.calls)

    def plain(self, failed: np.ndarray) -> None:
        """Draw samples, twice as many each time, until the gate is content or gives up."""
        tools, K = self.tools, self.tools.n_samples
        open_ = np.arange(self._affordable(len(self.states), K))
        samples = self._drawn(open_, K) if len(open_) else None
        while len(open_):
            variance = label_variance(samples.log_weight, samples.labels)
            verdict = verdicts(samples.log_weight, variance, tools.gates, failed[open_])
            more = verdict == MORE
            n_more = self._affordable(int(more.sum()), samples.energy.shape[1])
            more[np.flatnonzero(more)[n_more:]] = False
            # Without calls for more, an error bar that is right is still right.
            cut_off = (verdict == MORE) & ~more
            verdict[cut_off & trusted(samples.log_weight, tools.gates)] = ACCEPT
            self._conclude(open_[~more], samples[~more], variance[~more], verdict[~more])
            open_, samples = open_[more], samples[more]
            if len(open_):
                samples = samples.with_more(self._drawn(open_, samples.energy.shape[1]))

    def _drawn(self, index: np.ndarray, n_samples: int) -> Samples:
        # Counted from the result: other processes may share the work.
        samples = reconstruct(
            self.tools.backmapper, self.tools.potential, self.states[index], n_samples, self.rng
        )
        self._spend(PLAIN, samples.n_calls)
        return samples

    def _conclude(
        self, index: np.ndarray, samples: Samples, variance: np.ndarray, verdict: np.ndarray
    ) -> None:
        """Take down what plain samples say, and the labels of those that the gate accepts."""
        if not len(index):
            return
        log_weight = samples.log_weight
        self.verdict[index] = np.where(verdict == ACCEPT, PLAIN, verdict)
        self.n_plain[index] = log_weight.shape[1]
        self.columns["ess"][index] = effective_sample_size(log_weight, axis=1)
        self.columns["pareto_k"][index] = pareto_k(log_weight, axis=1)
        self.columns["label_variance"][index] = variance
        with np.errstate(invalid="ignore"):  # a clash has the log-weight -inf
            self.columns["log_weight_variance"][index] = log_weight.var(axis=1)
        factor = inflation(log_weight)
        split = thermodynamics(log_weight, samples.energy, samples.temperature_K)
        self._tabulate(index, Thermodynamics(*(Estimate(v, np.sqrt(factor) * e) for v, e in split)))
        good = verdict == ACCEPT
        if good.any():
            labels = Labels.from_samples(samples[good])
            labels = replace(
                labels,
                force_variance=factor[good] * labels.force_variance,
                free_energy_variance=factor[good] * labels.free_energy_variance,
            )
            self._keep(index[good], samples[good], labels)

    def annealed(self) -> None:
        """Anneal where plain weights are too poor."""
        tools, K = self.tools, self.tools.n_samples
        waiting = np.flatnonzero(self.verdict == ANNEAL)
        index = waiting[: self._affordable(len(waiting), annealing_calls(K, tools.gates))]
        if not len(index):
            return
        flow, states, potential = tools.backmapper, self.states[index], self._counted
        self.verdict[index] = RESTRAIN
        try:
            path = tune_path(
                flow, potential, states, _TUNING, self.rng, max_stages=tools.gates.max_stages
            )
        except PathTooLongError:
            return
        samples = anneal(flow, potential, states, K, path, self.rng)
        log_z = samples.log_partition
        good = np.flatnonzero(log_z.error**2 <= 1 / tools.gates.min_effective)
        if not len(good):
            return
        samples = samples[good]
        index = index[good]
        self.verdict[index] = ANNEALED
        split = samples.thermodynamics(flow.temperature_K)
        self._tabulate(index, split)
        labels = Labels.from_estimates(
            samples.beads, samples.average(samples.labels), split.free_energy, ANNEALED
        )
        self._keep(index, samples, labels)

    def restrained(self, folder: Path) -> None:
        """Run restrained dynamics where nothing else will do."""
        restraint, flow = self.tools.restraint, self.tools.backmapper
        waiting = np.flatnonzero(self.verdict == RESTRAIN)
        if restraint is None or not len(waiting):
            return
        index = waiting[: self._affordable(len(waiting), restraint.calls_per_state)]
        if not len(index):
            return
        states, seed = self.states[index], int(self.rng.integers(2**31))
        starts = restraint.starts(states, flow.cg_map)
        data, n_calls, *_ = restraint.run(states, starts, folder, seed)
        self._spend(RESTRAINED, n_calls)
        if data is None:
            return
        for place, state in enumerate(index):
            own = data.walker == place
            if not own.any():
                continue  # its run failed
            found = label_run(flow, data[own], self.tools.guess, state, restraint.force_map)
            if found is not None:
                self.verdict[state] = RESTRAINED
                self.labels.append(found[0])
                self.buffers.append(found[1])

    def _keep(self, index: np.ndarray, samples: Samples | AnnealedSamples, labels: Labels) -> None:
        """Take down labels, one per state, and put samples into the buffer."""
        self.labels.append(labels)
        for row, state in enumerate(index):
            chosen, weight = thinned(samples.log_weight[row], self.tools.n_samples, self.rng)
            n = len(chosen)
            self.buffers.append(
                Buffer(
                    beads=np.repeat(samples.beads[row][None], n, axis=0),
                    positions=samples.positions[row, chosen],
                    forces=samples.forces[row, chosen],
                    energy=samples.energy[row, chosen],
                    weight=weight,
                    state=np.full(n, state),
                    bead_force=np.repeat(labels.force[row][None], n, axis=0),
                    free_energy=np.full(n, labels.free_energy[row]),
                )
            )

    def _tabulate(self, index: np.ndarray, split: Thermodynamics) -> None:
        for name, estimate in split._asdict().items():
            self.columns[name][index] = estimate.value
            self.columns[f"{name}_error"][index] = estimate.error

    def _affordable(self, n: int, calls: int) -> int:
        """Return how many of n states the budget allows so many calls each."""
        return int(min(n, max(self.left, 0) // calls))

    def _spend(self, kind: str, n_calls: int) -> None:
        self.calls[kind] += n_calls
        self.left -= n_calls

    def _counted(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate the potential for annealing; calls of a path that is given up count as well."""
        self._spend(ANNEALED, len(positions))
        return self.tools.potential(positions)


def annealing_calls(n_samples: int, gates: Gates) -> int:
    """Return the most energy calls that annealing a state may take, finding the path included."""
    warm_up, moves = 3 * 5, 5  # leapfrog steps per stage, as in `tune_path`
    stages = gates.max_stages
    return _TUNING * (1 + stages * warm_up) + n_samples * (1 + stages * moves)

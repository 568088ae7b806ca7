"""Labels with error bars for coarse states, each by the cheapest way that can be trusted.

At every state: K plain samples, the gate (`gates`), and by its verdict a label, as many samples
again, annealing in noise space, or dynamics restrained to s. What a label comes from and its
variance go with it; nothing is clipped, and a state without a label that can be trusted has none.

States are worked off in portions, in random order. A portion is a pure function of the arguments
and of the calls that earlier ones spent; its file is complete or not there. So a killed run loses
one portion and ends in the same bits, and a budget that ends early leaves states of all kinds done.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ccg_ase.torsion_map import TorsionMap

from .buffer import Buffer
from .estimators import to_kJ_per_mol, typical
from .forward_check import ForwardCheck, Neighbourhoods, choose_frames
from .labels import ANNEALED, PLAIN, RESTRAINED, Labels
from .portions import CALLS, REFUSED, SKIPPED, Portion, PortionLabeller
from .reference import ReferenceData, read_npz, write_npz
from .restrained_labels import Restraint
from .thresholds import Gates


@dataclass(frozen=True)
class LabelSettings:
    """How states are labelled.

    Attributes
    ----------
    n_samples
        K, plain samples at first, annealed samples, and the most that the buffer keeps of a state.
    gates
        Thresholds.
    n_checked
        Held-out frames of the forward check; 0: no check.
    max_calls
        Energy calls that may be spent, those of the check included. A step that could take more
        than are left isn't begun. None: no limit.
    portion
        States per portion.
    seed
        Of everything.
    """

    n_samples: int = 64
    gates: Gates = field(default_factory=Gates)
    n_checked: int = 100
    max_calls: int | None = None
    portion: int = 16
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Labelled:
    """What labelling gave.

    Attributes
    ----------
    labels
        Of all states that have one; several for a state with restrained dynamics, each at its own
        s.
    buffer
        Frames for the flow's fit; `state` counts the states as they were given.
    table
        Columns over the states as they were given: ``beads``; ``verdict`` (plain, annealed,
        restrained, refused: no way was left that can be trusted, skipped: the budget had ended);
        ``ess``, ``pareto_k`` and ``n_samples`` of plain samples; ``free_energy``, ``energy`` (eV)
        and ``entropy`` (eV/K) with ``..._error``; ``label_variance``; and of the forward check
        ``n_frames`` (0: unchecked), ``missed``, ``forward_ess`` and ``surplus``.
    calls
        Energy calls spent, by kind: "check", "plain", "annealed", "restrained".
    """

    labels: Labels
    buffer: Buffer
    table: dict[str, np.ndarray]
    calls: dict[str, int]

    @property
    def count(self) -> Counter[str]:
        """Number of states by verdict."""
        return Counter(self.table["verdict"].tolist())

    def figures(self) -> dict[str, Any]:
        """Return the figures of a stage: counts of states, energy calls, quality of weights."""
        count = self.count
        ess = self.table["ess"][np.isfinite(self.table["ess"])]
        return {
            "calls": sum(self.calls.values()),
            **{f"calls_{kind}": n for kind, n in self.calls.items()},
            "states": len(self.table["verdict"]),
            "accepted": count[PLAIN],
            **{name: count[name] for name in (ANNEALED, RESTRAINED, REFUSED, SKIPPED)},
            "unchecked": int((self.table["n_frames"] == 0).sum()),
            "labels": len(self.labels),
            "ess_mean": float(ess.mean()) if len(ess) else None,
            "ess_p5": float(np.percentile(ess, 5)) if len(ess) else None,
            "label_variance_kJ2": _finite(to_kJ_per_mol(typical(self.table["label_variance"]))),
        }

    def told(self) -> str:
        """Say what became of the states, and why some have no label."""
        count = self.count
        parts = [f"{count[name]} {name}" for name in (PLAIN, ANNEALED, RESTRAINED) if count[name]]
        if count[REFUSED]:
            parts.append(f"{count[REFUSED]} refused: no way was left that can be trusted")
        if count[SKIPPED]:
            parts.append(f"{count[SKIPPED]} skipped: max_calls were spent")
        return f"labels: {', '.join(parts)}"


def label(
    backmapper: nn.Module,
    potential: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    states: np.ndarray,
    directory: Path,
    settings: LabelSettings,
    *,
    held_out: ReferenceData | None = None,
    restraint: Restraint | None = None,
    guess: Callable[[np.ndarray], np.ndarray] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Labelled:
    """Label states.

    Parameters
    ----------
    backmapper, potential
        The flow, and the atomistic energies and forces.
    states
        (S, n_beads, 3) in Å, or (S, n_torsions) in rad.
    directory
        Holds the portions; call again with the same arguments to continue.
    settings
        How.
    held_out
        Frames with energies that the flow wasn't fitted to, for the forward check. Without them,
        and far from all of them, states are unchecked: plain weights are then taken at their word.
    restraint
        Restrained dynamics. Without it, states that need it are refused.
    guess
        A rough -∂F/∂s of states, of their shape: the part of the variation of restrained labels
        that needn't count as noise.
    progress
        Called with states done and in all.

    Raises
    ------
    ValueError
        If there is no state.
    """
    if not len(states):
        raise ValueError("there is no state to label: sample bead states first")
    directory.mkdir(parents=True, exist_ok=True)
    name = _fingerprint(backmapper, states, settings, held_out, restraint)
    near, calls = _checked(backmapper, potential, states, directory / name, settings, held_out)
    labeller = PortionLabeller(
        backmapper, potential, settings.n_samples, settings.gates, restraint, guess
    )
    failed = near.failed(settings.gates)
    order = np.random.default_rng([settings.seed, 0]).permutation(len(states))
    spent, parts = dict.fromkeys(CALLS, 0) | {"check": calls}, []
    for number, start in enumerate(range(0, len(order), settings.portion)):
        index = order[start : start + settings.portion]
        path = directory / f"{name}_{number:04d}.npz"
        if not path.is_file():
            budget = np.inf if settings.max_calls is None else settings.max_calls
            left, rng = (
                budget - sum(spent.values()),
                np.random.default_rng([settings.seed, 1, number]),
            )
            labeller.label(states[index], failed[index], left, rng, path).save(path)
        parts.append(Portion.load(path))
        for kind, n in parts[-1].calls.items():
            spent[kind] += n
        if progress is not None:
            progress(start + len(index), len(states))
    whole = _joined(parts, order)
    table = whole.table | {"n_frames": near.n_frames}
    table |= {name: getattr(near, name) for name in ("missed", "forward_ess", "surplus")}
    return Labelled(whole.labels, whole.buffer, table, spent)


def _checked(
    backmapper: nn.Module,
    potential: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    states: np.ndarray,
    path: Path,
    settings: LabelSettings,
    held_out: ReferenceData | None,
) -> tuple[Neighbourhoods, int]:
    """Do the forward check, or read it; return its verdicts and its energy calls."""
    path = path.with_name(f"{path.name}_check.npz")
    cg_map, K = backmapper.cg_map, settings.n_samples
    n = 0 if held_out is None else min(settings.n_checked, len(held_out))
    n = n if settings.max_calls is None else min(n, settings.max_calls // (4 * K))
    if n == 0:
        unknown = np.full(len(states), np.nan)
        return Neighbourhoods(np.zeros(len(states), int), *[unknown] * 4), 0
    topology = None if isinstance(cg_map, TorsionMap) else cg_map.beads
    if not path.is_file():
        chosen = choose_frames(cg_map.apply(held_out.positions), n, topology, settings.seed)
        rng = np.random.default_rng([settings.seed, 2])
        found = ForwardCheck.from_frames(backmapper, potential, held_out[chosen], K, rng)
        write_npz(path, vars(found))
    stored = {key: a.item() if a.ndim == 0 else a for key, a in read_npz(path).items()}
    check = ForwardCheck(**stored)
    return check.near(states, topology, settings.gates), check.n_calls


def _joined(parts: list[Portion], order: np.ndarray) -> Portion:
    """Join portions; the table, and the states of the buffer, in the order of all states."""
    starts = np.cumsum([0] + [len(part.table["ess"]) for part in parts])
    buffers = [
        replace(part.buffer, state=order[part.buffer.state + start])
        for part, start in zip(parts, starts, strict=False)
    ]
    back = np.argsort(order)
    columns = {
        name: np.concatenate([part.table[name] for part in parts])[back] for name in parts[0].table
    }
    labels = Labels.concatenate(*(part.labels for part in parts))
    return Portion(labels, Buffer.concatenate(*buffers), columns, {})


def _fingerprint(
    backmapper: nn.Module,
    states: np.ndarray,
    settings: LabelSettings,
    held_out: ReferenceData | None,
    restraint: Restraint | None,
) -> str:
    """Name of the files of these arguments: portions of others are never taken for them."""
    told = hashlib.sha256(repr(settings).encode())
    told.update(repr(restraint and restraint.calls_per_state).encode())
    frames = () if held_out is None else (held_out.positions,)
    for array in (states, *frames):
        told.update(np.ascontiguousarray(array, dtype=float).tobytes())
    for parameter in backmapper.state_dict().values():
        told.update(np.ascontiguousarray(parameter.detach().cpu().numpy()).tobytes())
    return told.hexdigest()[:12]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

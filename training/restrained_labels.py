"""Mean-force labels from dynamics restrained to a state, with errors that know of correlation.

A harmonic restraint on s leaves p(x|s) as it is: every frame is a sample at its own s, and its
pulled-back label (E3b) an unbiased estimate of -∂F/∂s there. F isn't known from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree
from torch import nn

from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap

from .buffer import Buffer
from .force_aggregation import ForceMap
from .labels import RESTRAINED, Labels
from .plain_forces import quieter
from .reconstruction import FrameNotCoveredError, pull_back_frames
from .reference import ReferenceData
from .restrained import RestrainedFrames
from .states import state_features

_BLOCKS = 5  # that the frames of a run are cut into
_CANDIDATES = 20_000  # frames among which starts are sought


@dataclass(frozen=True, eq=False)
class Restraint:
    """Restrained dynamics, as `labelling.label` needs them.

    Attributes
    ----------
    run
        Called with targets (S, ...), starts (S, n_atoms, 3) in Å, a folder of its own and a seed;
        frames are samples of p(x|s) at their own s, and a state may have none.
    calls_per_state
        Most calls that it takes per state.
    frames
        Structures that runs can start from, (N, n_atoms, 3), Å.
    force_map
        Gives plain forces on the beads, to be taken where labels pulled back through the flow have
        more noise; None: never.
    """

    run: Callable[[np.ndarray, np.ndarray, Path, int], RestrainedFrames]
    calls_per_state: int
    frames: np.ndarray
    force_map: ForceMap | None = None

    def starts(self, states: np.ndarray, cg_map: CGMap | TorsionMap) -> np.ndarray:
        """Return the frame nearest to each state, (S, n_atoms, 3).

        Not a sample of the flow, which may have dropped the mode that the state has.
        """
        frames = self.frames[:: -(-len(self.frames) // _CANDIDATES)]
        topology = None if isinstance(cg_map, TorsionMap) else cg_map.beads
        both = state_features(np.concatenate([cg_map.apply(frames), states]), topology)
        if not both.shape[1]:  # one bead has no shape: any frame will do
            both = np.zeros((len(both), 1))
        _, nearest = cKDTree(both[: len(frames)]).query(both[len(frames) :])
        return frames[nearest]


def label_run(
    backmapper: nn.Module,
    data: ReferenceData,
    guess: Callable[[np.ndarray], np.ndarray],
    state: int,
    force_map: ForceMap | None = None,
) -> tuple[Labels, Buffer] | None:
    """Label the frames of one restrained run.

    Parameters
    ----------
    backmapper
        The flow.
    data
        Frames of one walker in order of time, with energies and forces.
    guess
        A rough -∂F/∂s of states, of their shape.
    state
        What the buffer calls it.
    force_map
        As in `Restraint`.

    Returns
    -------
    labels, buffer
        One label per frame, at its own s; frames of weight one. None if there are fewer than ten
        frames, or the flow doesn't cover one of them.
    """
    if len(data) < 2 * _BLOCKS:
        return None
    try:
        frames = pull_back_frames(backmapper, data.positions, data.energy, data.forces)
    except FrameNotCoveredError:
        return None
    guessed = guess(frames.beads)
    rest = frames.labels[:, 0] - guessed
    if force_map is not None:
        plain = force_map.apply(data.forces) - guessed
        rest = rest if quieter(rest, plain) else plain
    labels = Labels(
        frames.beads,
        guessed + rest,
        np.full(len(data), correlated_variance(rest)),
        run=np.full(len(data), state),
        origin=RESTRAINED,
    )
    n = len(data)
    buffer = Buffer(
        beads=frames.beads,
        positions=frames.positions[:, 0],
        forces=frames.forces[:, 0],
        energy=data.energy,
        weight=np.ones(n),
        state=np.full(n, state),
        bead_force=guessed + rest.mean(0),
        free_energy=np.full(n, np.nan),
    )
    return labels, buffer


def correlated_variance(values: np.ndarray, n_blocks: int = _BLOCKS) -> float:
    """Variance of one component that makes n correlated values weigh what they are worth together.

    It is n times the variance of their mean, from block averages, and at least the variance of a
    single value: a fit that takes the values as independent then gives their mean its right error.

    Parameters
    ----------
    values
        A series in order of time, (n, ...); averaged over components.
    n_blocks
        Blocks that count as independent.
    """
    blocks = np.array([part.mean(0) for part in np.array_split(values, n_blocks)])
    together = len(values) * blocks.var(0, ddof=1).mean() / n_blocks
    return float(max(together, values.var(0, ddof=1).mean()))

"""Backmap: atoms on a bead trajectory, while it is read."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import MDAnalysis as mda
import numpy as np
import torch
from ase import units
from MDAnalysis.coordinates.timestep import Timestep
from MDAnalysis.exceptions import NoDataError
from MDAnalysis.transformations.base import TransformationBase

from ccg_ase.devices import device_of
from ccg_ase.units import thermal_energy
from ccg_mda.bead_checks import BeadCheck
from ccg_mda.bead_sources import in_model_order
from ccg_mda.grafting import Graft
from ccg_mda.potential import Potential
from ccg_mda.readers import BeadFrame, BeadReader
from ccg_mda.relaxation import relax
from ccg_mda.universe import require_beads, select_indices, universe_from
from ccg_mda.whole_beads import periodic_cell

if TYPE_CHECKING:
    from ccg_mda.flow import Backmapper

Transformations = Iterable[Callable[[Timestep], Timestep]]
_KJ_MOL_PER_EV = units.mol / units.kJ
_NO_PART = (
    "a part of the atoms has no energy and no weight: leave out the potential, or reconstruct all "
    "atoms and select the part afterwards"
)
_BLOCKS_KEPT = 4  # the first one (rewinding reads frame 0), the current one, and those of copies


class _Atoms(NamedTuple):
    """What a frame gets: positions in Å, forces in kJ/(mol Å) if known, and ``ts.data``."""

    positions: np.ndarray
    forces: np.ndarray | None
    data: dict[str, float]


@dataclass
class _Block:
    """Consecutive frames that one call of the model reconstructed."""

    beads: np.ndarray
    box: np.ndarray | None
    positions: np.ndarray
    log_prob: np.ndarray
    served: dict[int, _Atoms] = field(default_factory=dict)

    def holds(self, row: int, beads: np.ndarray, box: np.ndarray | None) -> bool:
        """Tell whether a row was made from these beads (n_beads, 3) and this box (1, 3, 3)."""
        if (box is None) != (self.box is None) or not np.array_equal(self.beads[row], beads):
            return False
        return box is None or np.array_equal(self.box[row], box[0])


def _cells(frames: Sequence[BeadFrame], own: BeadFrame) -> np.ndarray | None:
    """Return the cell vectors of frames as rows, (n, 3, 3) in Å, or None if `own` has no box.

    Frames that were read ahead, without the transformations that gave `own` its box, get that one.
    """
    if own.dimensions is None:
        return None
    boxes = [own.dimensions if f.dimensions is None else f.dimensions for f in frames]
    return np.stack([periodic_cell(box) for box in boxes])


class Backmap(TransformationBase):
    """Reconstruct the atoms of every frame of a `BeadReader`.

    ::

        ( )───( )───( )          H  O       H
                         ──▶     │  ║       │
         beads s                ─N──C──Cα──N─     x ~ q(x|s)

    A frame is a pure function of (seed, bead frame, sample): its noise is drawn on the CPU from
    ``SeedSequence([seed, cg_frame, sample])``, whatever the order of access, worker or copy. The
    model sees ``prefetch`` frames at once, always in the same aligned blocks and always that many,
    so that even the last bits don't depend on what was read before.

    Where frames have a box, molecules come out whole, beside their first bead: no need to unwrap
    the beads, and `wrap` may follow.

    It sets ``ts.positions`` and

    - ``ts.data["log_prob"]``: ln q(x|s), natural log of a density on {x : M x = s}, in Å;
    - with a potential: ``ts.data["energy"]`` U in eV; ``ts.data["log_weight"]`` = -U/kT - ln q, the
      log of target over proposal *given s* (see `log_weights` for whole ensembles); ``ts.forces``
      in MDAnalysis' kJ/(mol Å). A clash has energy +inf, log weight -inf and zero forces.

    Log values belong to the float64 positions, before MDAnalysis rounds them to float32. Torch runs
    on one thread within a call: more slow small models down, and a worker that was forked after
    its parent had used OpenMP would hang.

    Parameters
    ----------
    model
        The `Backmapper`.
    seed
        Non-negative integer.
    potential
        Atomistic `Potential`; called once per frame read, never ahead.
    prefetch
        Frames per call of the model. 1 is best if frames are read far apart.
    temperature_K
        One that the model was trained for; default its own. Weights are those of this temperature.
    relax
        Steps of minimisation with the potential at fixed beads (`relaxation.relax`).
    atoms
        Indices of the atoms to place, if the reader doesn't present all. They are drawn with all
        others and hence the same; there is no log_prob, since that of a part isn't known.

    Example
    -------
    ::

        u = mda.Universe("protein.pdb", u_cg, format=BeadReader, cg_map=model.cg_map,
                         transformations=[Backmap(model)])
    """

    def __init__(
        self,
        model: Backmapper,
        *,
        seed: int = 0,
        potential: Potential | None = None,
        prefetch: int = 16,
        temperature_K: float | None = None,
        relax: int = 0,
        atoms: np.ndarray | None = None,
    ) -> None:
        require_beads(model.cg_map)
        if potential is not None and potential.n_atoms != model.cg_map.n_atoms:
            raise ValueError(
                f"the potential has {potential.n_atoms} atoms, the model {model.cg_map.n_atoms}; "
                "build both for the same molecule and atom order"
            )
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, got {prefetch}")
        if relax < 0:
            raise ValueError(f"relax is a number of steps, got {relax}")
        if relax and potential is None:
            raise ValueError(f"relax={relax} needs a potential to minimise")
        if atoms is not None and potential is not None:
            raise ValueError(_NO_PART)
        np.random.SeedSequence(seed)  # refuses what isn't a seed
        self._device, self._check = device_of(model), BeadCheck(model.cg_map)
        # CUDA doesn't survive a fork.
        super().__init__(max_threads=1, parallelizable=self._device.type == "cpu")
        self.model = model
        self.temperature_K = model.temperature_K if temperature_K is None else float(temperature_K)
        self.seed = int(seed)
        self.potential = potential
        self.prefetch, self.relax, self.atoms = int(prefetch), int(relax), atoms
        self._blocks: OrderedDict[int, _Block] = OrderedDict()

    def __call__(self, ts: Timestep) -> Timestep:
        """Fill ``ts`` with atoms, on one torch thread (threadpoolctl would cost 1.6 ms)."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._transform(ts)
        finally:
            torch.set_num_threads(threads)

    def _transform(self, ts: Timestep) -> Timestep:
        block, row = self._block(ts)
        if not (np.isfinite(block.positions[row]).all() and np.isfinite(block.log_prob[row])):
            raise ValueError(
                f"the model gives NaN or infinity at frame {ts.frame}; its beads are probably far "
                "from anything it was trained on"
            )
        if row not in block.served:
            block.served[row] = self._serve(block.positions[row], float(block.log_prob[row]))
        served = block.served[row]
        ts.positions = served.positions
        if served.forces is not None:
            ts.forces = served.forces
        ts.data |= served.data
        return ts

    def _serve(self, positions: np.ndarray, log_prob: float) -> _Atoms:
        """Add what the potential says of a frame; frames that are only read ahead cost no call."""
        if self.atoms is not None:
            return _Atoms(positions[self.atoms], None, {})
        if self.potential is None:
            return _Atoms(positions, None, {"log_prob": log_prob})
        if self.relax:
            positions, energy, forces = relax(
                self.potential, self.model.cg_map, positions, self.relax
            )
            return _Atoms(positions, forces * _KJ_MOL_PER_EV, {"energy": float(energy)})
        energy, forces = self.potential(positions)
        log_weight = -float(energy) / thermal_energy(self.temperature_K) - log_prob
        data = {"log_prob": log_prob, "energy": float(energy), "log_weight": log_weight}
        return _Atoms(positions, forces * _KJ_MOL_PER_EV, data)

    def _block(self, ts: Timestep) -> tuple[_Block, int]:
        """Return the block of this frame and the row in it, from the cache if it's the same."""
        number, row = divmod(ts.frame, self.prefetch)
        frame = self._frame(ts)
        box = _cells([frame], frame)
        try:
            self._check(frame.beads, None if box is None else box[0])
        except ValueError as error:
            raise ValueError(f"frame {ts.frame}: {error}") from None
        block = self._blocks.get(number)
        # One transformation may serve several trajectories: same beads, not only same number.
        if block is None or not block.holds(row, frame.beads, box):
            block = self._blocks[number] = self._evaluate(ts, frame, row)
        self._blocks.move_to_end(number)
        if len(self._blocks) > _BLOCKS_KEPT:
            self._blocks.popitem(last=False)
        return block, row

    def _frame(self, ts: Timestep) -> BeadFrame:
        try:
            beads = ts.data["beads"]
        except KeyError:
            raise NoDataError(
                f"frame {ts.frame} carries no beads; read the bead trajectory with "
                "format=BeadReader, or use backmap()"
            ) from None
        n_beads = self.model.cg_map.n_beads
        if beads.shape != (n_beads, 3):
            raise ValueError(f"the model has {n_beads} beads, the frame {beads.shape[0]}")
        if not np.isfinite(beads).all():
            raise ValueError(f"bead positions of frame {ts.frame} are NaN or infinite")
        return BeadFrame(beads, ts.dimensions, ts.data["cg_frame"], ts.data["sample"])

    def _evaluate(self, ts: Timestep, frame: BeadFrame, row: int) -> _Block:
        """Reconstruct the whole block; places beyond the trajectory are filled with this frame."""
        frames = [frame] * self.prefetch
        # MDAnalysis gives transformations nothing but the Timestep; this is its way to the reader.
        reader = ts._reader() if getattr(ts, "_reader", None) is not None else None
        if isinstance(reader, BeadReader) and self.prefetch > 1:
            first = ts.frame - row
            ahead = range(first, min(first + self.prefetch, reader.n_frames))
            frames[: len(ahead)] = reader.look_ahead(ahead)
            frames[row] = frame  # as earlier transformations may have left it
        beads, box = np.stack([f.beads for f in frames]), _cells(frames, frame)
        noise = torch.stack(
            [
                self.model.sample_noise(
                    np.random.default_rng([self.seed, int(f.cg_frame), int(f.sample)])
                )
                for f in frames
            ]
        )
        with torch.no_grad():
            distribution = self.model(
                torch.tensor(beads, dtype=torch.float64, device=self._device),
                temperature_K=self.temperature_K,
                box=None if box is None else torch.tensor(box, device=self._device),
            )
            placed = distribution.positions_and_log_prob_from(noise.to(self._device))
        positions, log_prob = (value.cpu().numpy() for value in placed)
        return _Block(beads, box, positions, log_prob)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache behind and turn the model into bytes.

        Torch would hand tensors to worker processes in shared memory, one open file for each.
        """
        return {**self.__dict__, "_blocks": OrderedDict(), "model": pickle.dumps(self.model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, model=pickle.loads(state["model"]))


def backmap(
    u_cg: mda.Universe | mda.AtomGroup,
    model: Backmapper | str | PathLike[str],
    *,
    n_samples: int = 1,
    seed: int = 0,
    potential: Potential | None = None,
    prefetch: int = 16,
    temperature_K: float | None = None,
    relax: int = 0,
    only: str | None = None,
    rest: mda.Universe | mda.AtomGroup | None = None,
    transformations: Transformations | Callable[[mda.Universe], Transformations] = (),
) -> mda.Universe:
    """Return the atomistic Universe of a bead trajectory; atoms are placed as frames are read.

    Parameters
    ----------
    u_cg
        The bead Universe (`coarse_grain`, `bead_universe`, any other), or an AtomGroup of its
        beads. Names and residues that it knows must be the model's; another order is put right
        (`in_model_order`). It's copied, and stays at its frame.
    model
        A `Backmapper`, or the path of a model file that holds one.
    n_samples
        Reconstructions per bead frame; frame = bead frame · n_samples + sample.
    seed, potential, prefetch, temperature_K, relax
        See `Backmap`.
    only
        Selection of the atoms to reconstruct, e.g. ``"resid 10:20"``. It needs no less time than
        all atoms, but memory and files of that size. Without weights and potential.
    rest
        With ``only``: all atoms, from the current frame of which the others are taken (`Graft`).
        Without it, the Universe has no others.
    transformations
        Applied to every frame after the atoms are placed; or a function that makes them from the
        new Universe, for those that need its atoms: ``lambda u: [wrap(u.atoms)]``.

    Returns
    -------
    Universe
        With names, types, elements, masses, bonds, residues and, where known, charges. ``ts.data``
        holds beads, cg_frame, sample, log_prob and, with a potential, energy and log_weight; the
        H5MD format keeps them in a file, others and ``transfer_to_memory`` lose them.

    Raises
    ------
    ValueError
        If beads, temperature or potential don't belong to the model.

    Example
    -------
    ::

        u = ccg_mda.backmap(u_cg, "model.ccg", n_samples=4)
        RMSD(u, ref, select="name CA").run(backend="multiprocessing", n_workers=2)
    """
    if isinstance(model, str | PathLike):
        from ccg_mda.flow import Backmapper

        model = Backmapper.load(model)
    require_beads(model.cg_map)
    if only is not None and potential is not None:
        raise ValueError(_NO_PART)
    if rest is not None and only is None:
        raise ValueError("rest= gives the atoms outside of only=: say which are reconstructed")
    u, atoms, after = universe_from(model.cg_map.atoms), None, []
    if only is not None:
        part = _select(u, only)
        if rest is not None:
            taken = np.setdiff1d(np.arange(len(u.atoms)), part.ix)
            after.append(Graft(model.cg_map, rest.atoms.positions, taken))
        else:
            u, atoms = mda.Merge(part), part.ix
    beads = in_model_order(u_cg, model.cg_map)
    u.trajectory = BeadReader(beads, cg_map=model.cg_map, n_samples=n_samples, atoms=atoms)
    placed = Backmap(
        model,
        seed=seed,
        potential=potential,
        prefetch=prefetch,
        temperature_K=temperature_K,
        relax=relax,
        atoms=atoms,
    )
    after += transformations(u) if callable(transformations) else transformations
    u.trajectory.add_transformations(placed, *after)
    return u


def _select(u: mda.Universe, only: str) -> mda.AtomGroup:
    part = u.atoms[select_indices(u.atoms, only)]
    if not part:
        raise ValueError(
            f"only={only!r} selects no atoms; residues here are {u.residues.resids[0]} to "
            f"{u.residues.resids[-1]}"
        )
    return part

"""What a run measured, as plain arrays: the cycle fills it, the report draws it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from .reference import ReferenceDataError, read_npz, write_npz


def _none() -> np.ndarray:
    return np.empty(0)


@dataclass(eq=False)
class ReportData:
    """Arrays behind the figures and verdicts of a report.

    Every array may be left empty: its figure is then left out, and its verdict says "not measured".
    N differs from group to group; within a group it is the same. Angles are in rad, lengths in Å,
    energies in eV, label variances in (eV/Å)² per Cartesian component.

    Attributes
    ----------
    name, temperature_K
        Title of the run and temperature of the model.
    biased
        Whether the reference data are biased along the coarse variables: their populations say
        nothing then, and the arrays of the reference are left empty.
    by_torsions
        Whether torsions are the coarse variables: then there is no bead force field, and what
        concerns one is left empty.
    torsion_names
        One or two names, e.g. ``("φ  C-N-CA-C", "ψ  N-CA-C-N")``: bead torsions that the free
        energy is drawn over.
    torsions_reference, torsions_beads, torsions_atomistic
        (N, 1 or 2): of the reference data, of the bead dynamics, and of the reconstructed atoms.
    log_weights
        (N,) natural logs of the weights that turn the reconstructed atoms into the all-atom
        ensemble (unnormalised); belong to `torsions_atomistic` and `energy_atomistic`.
    atomistic_state
        (N,) int: the bead state that each reconstructed frame belongs to. Reconstructions of one
        state are not independent: errors and noise floors count states. Empty: all are different.
    independent_reference, independent_beads
        Independent samples behind the first two (0: taken as uncorrelated); set the noise floors.
    surface, surface_error, surface_labels
        Over torsions: F between the labels and its standard error in kT, (n,) or (n, n), at evenly
        spaced centres from -π; and where the labels are, (L, 1 or 2).
    bond_names, bonds_reference, bonds_beads
        Bead bonds: k names, (N, k) lengths in the reference, (N', k) in the bead dynamics.
    angle_names, angles_reference, angles_beads
        The same for bead angles.
    energy_reference, energy_atomistic
        (N,) potential energies of reference frames and of reconstructed frames.
    ess, ess_iteration, ess_rare
        (N,) effective sample size per bead state, as a fraction of its reconstructions; the
        iteration (from 1) that it belongs to; True where the state lies in a rare region.
    ess_labels
        What the iterations of `ess_iteration` are called, from the first; default: their numbers.
    label_variance_slice, label_variance
        (N,) variance of a single force on the bead atoms, and of a single pulled-back label, per
        bead state.
    residual_forward, residual_reverse
        (N,) joint residual of both models in kT, on held-out frames and on reconstructions of the
        bead ensemble: `consistency.Consistency`.
    weight_table, structure_table, coverage_table
        Tables of text from the held-out check, (n, 3), (n, 5) and (n, 3): rows of
        `ccg_mda.diagnostics.WeightQuality`, `StructureReport` and `TorsionCoverage`.
    turn_table, turn_calls, turn_accepted, turn_ess, turn_free_energy_error, turn_force_error
        One entry per turn of the loop: its row as text, (n, 10); energy calls up to its end; and at
        the states labelled in it, before models learnt from them: the share that has a label of F
        from plain weights, the mean effective sample size,
        the error of F in kT and of the mean force in eV/Å (NaN: no label).
    end_of_loop
        Why the loop ended, (2,): a word for it, and the sentence.
    stage_names, stage_iteration, stage_seconds, stage_calls
        Stages in the order they ran: name, iteration (0: before the loop), wall time, energy calls.
    picture_beads, picture_bead_bonds, picture_atoms, picture_atom_bonds, picture_elements
        One bead state (n_beads, 3), its bonds, several reconstructions (K, n_atoms, 3), the atoms'
        bonds and chemical symbols.
    """

    name: str = "model"
    temperature_K: float = 300.0
    biased: bool = False
    by_torsions: bool = False
    torsion_names: tuple[str, ...] = ()
    torsions_reference: np.ndarray = field(default_factory=_none)
    torsions_beads: np.ndarray = field(default_factory=_none)
    torsions_atomistic: np.ndarray = field(default_factory=_none)
    log_weights: np.ndarray = field(default_factory=_none)
    atomistic_state: np.ndarray = field(default_factory=_none)
    independent_reference: float = 0.0
    independent_beads: float = 0.0
    surface: np.ndarray = field(default_factory=_none)
    surface_error: np.ndarray = field(default_factory=_none)
    surface_labels: np.ndarray = field(default_factory=_none)
    bond_names: tuple[str, ...] = ()
    bonds_reference: np.ndarray = field(default_factory=_none)
    bonds_beads: np.ndarray = field(default_factory=_none)
    angle_names: tuple[str, ...] = ()
    angles_reference: np.ndarray = field(default_factory=_none)
    angles_beads: np.ndarray = field(default_factory=_none)
    energy_reference: np.ndarray = field(default_factory=_none)
    energy_atomistic: np.ndarray = field(default_factory=_none)
    ess: np.ndarray = field(default_factory=_none)
    ess_iteration: np.ndarray = field(default_factory=_none)
    ess_rare: np.ndarray = field(default_factory=_none)
    ess_labels: tuple[str, ...] = ()
    label_variance_slice: np.ndarray = field(default_factory=_none)
    label_variance: np.ndarray = field(default_factory=_none)
    residual_forward: np.ndarray = field(default_factory=_none)
    residual_reverse: np.ndarray = field(default_factory=_none)
    weight_table: np.ndarray = field(default_factory=_none)
    structure_table: np.ndarray = field(default_factory=_none)
    coverage_table: np.ndarray = field(default_factory=_none)
    turn_table: np.ndarray = field(default_factory=_none)
    turn_calls: np.ndarray = field(default_factory=_none)
    turn_accepted: np.ndarray = field(default_factory=_none)
    turn_ess: np.ndarray = field(default_factory=_none)
    turn_free_energy_error: np.ndarray = field(default_factory=_none)
    turn_force_error: np.ndarray = field(default_factory=_none)
    end_of_loop: tuple[str, ...] = ()
    stage_names: tuple[str, ...] = ()
    stage_iteration: np.ndarray = field(default_factory=_none)
    stage_seconds: np.ndarray = field(default_factory=_none)
    stage_calls: np.ndarray = field(default_factory=_none)
    picture_beads: np.ndarray = field(default_factory=_none)
    picture_bead_bonds: np.ndarray = field(default_factory=_none)
    picture_atoms: np.ndarray = field(default_factory=_none)
    picture_atom_bonds: np.ndarray = field(default_factory=_none)
    picture_elements: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        groups = {
            "one row per reconstructed frame": (
                "torsions_atomistic",
                "atomistic_state",
                "log_weights",
                "energy_atomistic",
            ),
            "one entry per bead state": ("ess", "ess_iteration", "ess_rare"),
            "one entry per turn": (
                "turn_table",
                "turn_calls",
                "turn_accepted",
                "turn_ess",
                "turn_free_energy_error",
                "turn_force_error",
            ),
            "one entry per stage": (
                "stage_names",
                "stage_iteration",
                "stage_seconds",
                "stage_calls",
            ),
        }
        for what, names in groups.items():
            lengths = {name: len(getattr(self, name)) for name in names if len(getattr(self, name))}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"expected {what}; got the lengths {lengths}")
        if len(self.torsion_names) > 2:
            raise ValueError(f"give at most two torsions, got {self.torsion_names}")

    def save(self, path: str | Path) -> None:
        """Write an NPZ file, atomically."""
        write_npz(path, {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)})

    @classmethod
    def load(cls, path: str | Path) -> ReportData:
        """Read what `save` wrote."""
        arrays = read_npz(path)
        unknown = set(arrays) - {f.name for f in fields(cls)}
        if unknown:
            raise ReferenceDataError(f"{path} is no report data: unknown arrays {sorted(unknown)}")
        values = {}
        for f in fields(cls):
            if f.name in arrays:
                array = arrays[f.name]
                values[f.name] = tuple(array.tolist()) if "tuple" in str(f.type) else array
                if array.ndim == 0:
                    values[f.name] = array.item()
        return cls(**values)

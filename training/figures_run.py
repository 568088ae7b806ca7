"""Figures of the run itself: labels, costs, and a picture of what a reconstruction is."""

from __future__ import annotations

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from .figures import ATOMS, BEADS, REFERENCE, new_figure, tidy
from .report_data import ReportData

ELEMENT_COLOURS = {"C": "#555555", "N": "#3050f8", "O": "#e03020", "S": "#c8a415", "H": "#b8b8b8"}
BEAD_COLOUR = "#f0a202"
PICTURED = 6  # reconstructions drawn


def label_variances(data: ReportData) -> Figure | None:
    """Variance of one mean-force label per bead state: forces on bead atoms, and pulled back."""
    if not data.label_variance.size or not data.label_variance_slice.size:
        return None
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    rows = (
        ("force on the\nbead atom", data.label_variance_slice, REFERENCE),
        ("pulled back\nthrough the flow", data.label_variance, ATOMS),
    )
    pooled = np.concatenate([values[values > 0] for _, values, _ in rows])
    edges = np.geomspace(pooled.min() / 1.2, pooled.max() * 1.2, 70)
    for row, (_, values, colour) in enumerate(rows):
        share = np.histogram(values, edges)[0]
        axes.stairs(-row + 0.8 * share / share.max(), edges, baseline=-row, fill=True, color=colour)
        axes.plot([values.mean()] * 2, [-row, -row + 0.9], color="black", lw=1.2)
        axes.annotate(
            f"{values.mean():.2g}",
            (values.mean(), -row + 0.9),
            ha="center",
            va="bottom",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_yticks([0.35, -0.65], [name for name, _, _ in rows])
    axes.set_ylim(-1.05, 1.2)
    axes.set_xlabel("variance of one label per component, over bead states ((eV/Å)²); bar: mean")
    tidy(axes)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _spaced(number: float) -> str:
    """Write a number with thin spaces between thousands."""
    return f"{number:,.0f}".replace(",", "\u2009")


def costs(data: ReportData) -> Figure | None:
    """Wall time and energy calls of every stage."""
    if not len(data.stage_names):
        return None
    turns = data.stage_iteration.astype(int)
    labels = [
        f"{turn}  {name}" if turn else name
        for name, turn in zip(data.stage_names, turns, strict=True)
    ]
    figure = new_figure(8.6, 0.26 * len(labels) + 1.0)
    left, right = figure.subplots(1, 2, sharey=True)
    rows = np.arange(len(labels))
    for axes, values, colour, title in (
        (left, data.stage_seconds, ATOMS, "wall time (s)"),
        (right, data.stage_calls, BEADS, "energy calls"),
    ):
        axes.barh(rows, values, color=colour, height=0.7)
        for row, value in enumerate(values):
            axes.annotate(
                _spaced(value),
                (value, row),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        axes.set_title(f"{title}: {_spaced(values.sum())} in all")
        axes.set_xlim(0, max(float(values.max()), 1) * 1.18)
        tidy(axes)
    left.set_yticks(rows, labels)
    left.invert_yaxis()
    return figure


def history(data: ReportData) -> Figure | None:
    """Draw errors at new states, and effective sample sizes there, against energy calls."""
    panels = (
        (data.turn_free_energy_error, "error of F (kT)", BEADS),
        (data.turn_force_error, "error of the mean force (eV/Å, eV/rad)", BEADS),
        (data.turn_ess, "effective sample size", ATOMS),
    )
    if len(data.turn_calls) < 2:
        return None
    figure = new_figure(8.6, 2.5)
    for axes, (values, label, colour) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(data.turn_calls, values, "o-", color=colour, lw=1.5, ms=4)
        axes.set_ylim(0, np.nanmax([*values, 1e-9]) * 1.1)
        axes.set_xlabel("energy calls so far")
        axes.set_title(label)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 3))
        tidy(axes)
    return figure


def picture(data: ReportData) -> Figure | None:
    """Beads, and several reconstructions of the atoms on the same beads."""
    if not data.picture_beads.size or not data.picture_atoms.size:
        return None
    bonds = data.picture_atom_bonds.astype(int).reshape(-1, 2)
    bead_bonds = data.picture_bead_bonds.astype(int).reshape(-1, 2)
    colours = np.array([ELEMENT_COLOURS.get(e, "#a050a0") for e in data.picture_elements])
    # Seen along the direction in which the molecule is thinnest.
    centre = data.picture_beads.mean(axis=0)
    frame = np.linalg.svd(np.concatenate(data.picture_atoms) - centre, full_matrices=False)[2]
    if np.linalg.det(frame) < 0:
        frame[2] = -frame[2]  # a rotation: a mirror image would show the other chirality
    beads = (data.picture_beads - centre) @ frame.T
    atoms = ((data.picture_atoms - centre) @ frame.T)[:PICTURED]
    figure = new_figure(8.6, 2.7)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    drawings = {
        "beads": atoms[:0],
        "one reconstruction": atoms[:1],
        f"{len(atoms)} reconstructions": atoms,
    }
    for panel, (title, shown) in zip(panels, drawings.items(), strict=True):
        if len(shown):
            # Half bonds in the colour of their atom, the far ones first.
            ends, middle = shown[:, bonds], shown[:, bonds].mean(axis=2, keepdims=True)
            halves = np.stack([ends, np.broadcast_to(middle, ends.shape)], axis=3).reshape(-1, 2, 3)
            paint = np.tile(colours[bonds].ravel(), len(shown))
            order = halves[..., 2].mean(axis=1).argsort()
            width, alpha = (3.2, 1.0) if len(shown) == 1 else (1.4, 0.6)
            panel.add_collection(
                LineCollection(
                    halves[order, :, :2],
                    colors=paint[order],
                    linewidths=width,
                    alpha=alpha,
                    capstyle="round",
                )
            )
        panel.add_collection(
            LineCollection(beads[bead_bonds][..., :2], colors=BEAD_COLOUR, linewidths=7, alpha=0.35)
        )
        panel.scatter(*beads[:, :2].T, s=220, color=BEAD_COLOUR, alpha=0.55, linewidths=0)
        panel.set_title(title, fontsize=10)
        panel.set_aspect("equal")
        panel.set_axis_off()
    span = np.concatenate([atoms.reshape(-1, 3), beads])
    panels[0].set_xlim(span[:, 0].min() - 0.6, span[:, 0].max() + 0.6)
    panels[0].set_ylim(span[:, 1].min() - 0.6, span[:, 1].max() + 0.6)
    return figure

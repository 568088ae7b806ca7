"""Draw the atoms that belong to one bead frame: an ensemble, not a structure; writes ensemble.png.

Lines are bonds, the darker the greater the weight of the structure given the beads.
"""

import matplotlib
import numpy as np
from backmapped import atoms

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SAMPLES, BEAD_FRAMES = 24, (0, 120)

u = atoms(SAMPLES)
figure, axes = plt.subplots(
    1, len(BEAD_FRAMES), figsize=(9, 4.5), subplot_kw={"projection": "3d"}, layout="constrained"
)
for axis, bead_frame in zip(axes, BEAD_FRAMES, strict=True):
    frames = u.trajectory[bead_frame * SAMPLES : (bead_frame + 1) * SAMPLES]
    structures, log_w = [], []
    for ts in frames:
        structures.append(ts.positions - ts.data["beads"].mean(axis=0))
        log_w.append(ts.data["log_weight"])
        beads = ts.data["beads"].copy()
    weights = np.exp(np.array(log_w) - max(log_w))
    for x, weight in zip(structures, weights, strict=True):
        for i, j in u.bonds.indices:
            axis.plot(*x[[i, j]].T, color="tab:blue", alpha=0.05 + 0.45 * weight, lw=1.5)
    s = beads - beads.mean(axis=0)
    axis.plot(*s.T, "o-", color="black", ms=6, lw=2.5)
    axis.set(title=f"bead frame {bead_frame}")
    axis.set_aspect("equal")
    axis.set_box_aspect(None, zoom=1.25)
    axis.set_axis_off()
figure.suptitle(f"{SAMPLES} structures on the same beads (black)")
figure.savefig("ensemble.png", dpi=150)
print("wrote ensemble.png")

"""Flow and force field fitted together, as the last step: the residual that is zero for both.

    R(x) = -l(x) - βF_φ(s) - c,   l = -βU - ln q(x|s)   (theory 5.4)

vanishes for all x if and only if q(x|s) = p(x|s) and F_φ = F. Its mean square over x of p(x|s) is

    E R² = E_s Var(l | s) + E_s (E[-l | s] - βF_φ(s) - c)²:

the first part is the flow's, and the best F_φ for the second is the regression of -l on s. With it
R is what F_φ can't explain of l: a single frame at s tells the scatter of the log-weights there,
which otherwise takes several. Such an F_φ is the optimal control variate; the models hand over to
each other what each knows better, and :mod:`.control_variate` says what it saves.

The loop is that of `fit_flow`, with its other terms as anchors: likelihood, noise force and label
keep the flow near the truth, and the labels of all iterations, by inverse variance, the force
field. Otherwise both could agree on something else where there are no frames.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import numpy as np

from ccg_ase.energies import bead_energies
from ccg_ase.forcefield import ForceField
from ccg_ase.units import thermal_energy
from ccg_mda.flow import Backmapper
from ccg_mda.weights import weighted_average

from .fit_flow import FlowFit, FlowFrames, FlowLoss, ProgressCallback, fit_flow, frame_nll
from .fit_forcefield import FitSettings, LabelLoss
from .labels import Labels

_FAR_KT = 4.0  # a residual beyond this counts linearly, as in the loss
_MOST_NATS = 5.0  # that the likelihood of a single frame counts
_BLOCKS = 20  # of held-out frames, in the order of time
_ERRORS = 2.0  # standard errors by which a figure may look worse


@dataclass(frozen=True)
class JointSettings:
    """How `fit_joint` goes about it.

    Parameters
    ----------
    steps, batch_size, learning_rate, patience
        Of `fit_flow`; the rate is that of both models. A tenth of that of the first fits: a higher
        one takes them away from where they are, and few steps don't bring them back.
    anchor
        Weight of the force field's labels, whose loss is about one at the truth, beside the loss
        of the flow.
    seed
        Of all batches.
    """

    steps: int = 300
    batch_size: int = 256
    learning_rate: float = 2e-4
    patience: int = 10
    anchor: float = 1.0
    seed: int = 0


@dataclass
class JointFit:
    """What a joint fit did.

    Attributes
    ----------
    fit
        The loop's own record.
    before, after
        Held-out figures of the models as they were and as they were fitted, undone or not:
        ``residual``, the mean Huber loss of R in kT²; ``nll`` in nats; ``force``, the mean square
        of force minus label by inverse variance, label noise included.
    change, error
        Their paired differences and the standard errors of these.
    worse
        Figures that rose by more than two standard errors; then the weights before were kept.
    """

    fit: FlowFit
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    change: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)

    @property
    def worse(self) -> tuple[str, ...]:
        """Figures that got worse beyond their noise."""
        return tuple(
            name for name, change in self.change.items() if not change <= _ERRORS * self.error[name]
        )

    def __str__(self) -> str:
        if not self.worse:
            return str(self.fit)
        rises = (
            f"{name} by {self.change[name]:.2g} ± {self.error[name]:.1g}" for name in self.worse
        )
        return f"{self.fit}; undone, since on held-out frames and labels rose {', '.join(rises)}"


def fit_joint(
    flow: Backmapper,
    force_field: ForceField,
    frames: FlowFrames,
    labels: Labels,
    held_out: FlowFrames,
    held_out_labels: Labels,
    terms: FlowLoss,
    settings: JointSettings | None = None,
    *,
    progress: ProgressCallback | None = None,
) -> JointFit:
    """Fit both models in place to the joint residual; never for the worse.

    The loop is in single precision. In double precision, held-out frames and labels then compare
    the fitted models with those before: where the residual, the flow's likelihood or the force
    error got worse by more than two standard errors, both models keep their weights from before.

    Parameters
    ----------
    flow, force_field
        The models; both have been fitted already.
    frames, held_out
        Frames with forces and energies; their bead forces and free energies don't count, since
        the force field gives them. Samples of a flow carry their weights w̄, so that at every s
        they stand for p(x|s). Held-out frames in the order of time.
    labels, held_out_labels
        What is known about F, to hold the force field and to judge it.
    terms
        Loss of the flow; ``energy`` weighs the residual, and ``label`` its slope along s.
    settings
        Default: `JointSettings()`.
    progress
        As in `fit_flow`.

    Raises
    ------
    ValueError
        If the loss has no ``energy``, or frames lack what it needs.
    FloatingPointError
        If the loss stops being finite.
    """
    settings = settings or JointSettings()
    if not terms.energy:
        raise ValueError(
            f"the loss {terms} has no energy term, hence no joint residual: take 'forces+energy'"
        )
    bare, bare_held_out = (
        replace(f, bead_force=None, free_energy=None) for f in (frames, held_out)
    )
    of_labels = FitSettings(batch_size=settings.batch_size, seed=settings.seed)
    before = _figures(flow, force_field, held_out, held_out_labels)
    models = (flow, force_field)
    weights = [copy.deepcopy(model.state_dict()) for model in models]
    fit = fit_flow(
        flow,
        bare,
        terms=terms,
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        held_out=bare_held_out,
        patience=settings.patience,
        free_energy=force_field,
        anchor=LabelLoss(force_field, labels, of_labels, settings.anchor),
        progress=progress,
    )
    result = JointFit(fit)
    after = _figures(flow, force_field, held_out, held_out_labels)
    for name, (values, log_weight) in before.items():
        change = after[name][0] - values
        if name == "nll":
            change = change.clip(-_MOST_NATS, _MOST_NATS)
        blocks = min(_BLOCKS, len(values))
        result.before[name], _ = map(float, weighted_average(values, log_weight, n_blocks=blocks))
        result.after[name], _ = map(
            float, weighted_average(after[name][0], log_weight, n_blocks=blocks)
        )
        result.change[name], result.error[name] = map(
            float, weighted_average(change, log_weight, n_blocks=blocks)
        )
    if result.worse:
        for model, before_fit in zip(models, weights, strict=True):
            model.load_state_dict(before_fit)
    return result


def _figures(
    flow: Backmapper, force_field: ForceField, held_out: FlowFrames, labels: Labels
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return loss and log-weight of every held-out frame or label, by name."""
    kt, log_weight = thermal_energy(flow.temperature_K), np.log(held_out.weight)
    nll = frame_nll(flow, held_out.positions)
    energy, _ = bead_energies(force_field, flow.cg_map.apply(held_out.positions))
    residual = (held_out.energy - energy) / kt - nll
    distance = np.abs(residual - robust_centre(residual))
    huber = np.where(distance < _FAR_KT, 0.5 * distance**2, _FAR_KT * (distance - 0.5 * _FAR_KT))
    _, force = bead_energies(force_field, labels.beads)
    square = np.square(labels.force - force).mean((-1, -2))
    mean_square = np.square(labels.force).mean()  # unknown noise is nearly everything
    variance = np.nan_to_num(labels.force_variance, nan=mean_square)
    weight = 1.0 / (variance + FitSettings().force_floor ** 2)
    return {
        "residual": (huber, log_weight),
        "nll": (nll, log_weight),
        "force": (weight * square, np.zeros(len(labels))),
    }


def robust_centre(values: np.ndarray) -> float:
    """Return the mean of values (N,), those beyond 4 kT of the median drawn in to there."""
    median = np.median(values)
    return float(np.clip(values, median - _FAR_KT, median + _FAR_KT).mean())

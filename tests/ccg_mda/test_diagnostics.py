"""Diagnostics against closed forms of the linear-Gaussian molecule, torsions made by hand."""

import numpy as np
import pytest
import torch
from linear_gaussian import GaussianBackmapper, LinearGaussian

import ccg_mda
from ccg_mda.bounds import forward_effective_sample_size, sandwich
from ccg_mda.coverage import COVERAGE_BINS, jensen_shannon, torsion_coverage
from ccg_mda.diagnostics import StructureProbe, diagnose
from ccg_mda.structure import StructureReference, check_structure

S, K = 400, 100
DISTORTION = {"shift": 0.08, "scale": 1.04, "bend": 0.06, "stretch": 0.03}


@pytest.fixture(scope="module")
def molecule():
    return LinearGaussian()


@pytest.fixture(scope="module")
def frames(molecule):
    return molecule.sample(S, np.random.default_rng(1))


@pytest.fixture(scope="module")
def found(molecule, frames):
    return diagnose(GaussianBackmapper(molecule, **DISTORTION), frames, molecule, S, K)


# --------------------------------------------------------------------- weights


def test_weights_have_the_closed_form_quality(molecule, frames, found):
    flow = GaussianBackmapper(molecule, **DISTORTION)
    beads = torch.from_numpy(molecule.cg_map.apply(frames))
    exact = flow.ess(beads)
    np.testing.assert_array_equal(found.frame, np.arange(S))
    assert found.weights.ess.mean() == pytest.approx(exact.mean(), abs=0.01)
    assert np.corrcoef(found.weights.ess, exact)[0, 1] > 0.5
    # 1/E_p[w] over s and x: the harmonic mean.
    assert found.weights.forward_ess == pytest.approx(1 / np.mean(1 / exact), abs=0.03)
    bounds = found.weights.bounds
    for estimate, truth in (
        (bounds.reverse_kl, flow.reverse_kl(beads).mean()),
        (bounds.forward_kl, flow.forward_kl(beads).mean()),
    ):
        assert abs(estimate.value - truth) < 4 * estimate.error
    assert (found.weights.pareto_k < 0.7).mean() > 0.95
    summary = found.summary()
    assert summary["lnZ_gap"] == pytest.approx(summary["reverse_kl"] + summary["forward_kl"])
    assert all(isinstance(value, float) for value in summary.values())


def test_the_exact_flow_is_perfect(molecule, frames):
    exact = diagnose(GaussianBackmapper(molecule), frames, molecule, 50, 30)
    np.testing.assert_allclose(exact.weights.ess, 1)
    assert exact.weights.forward_ess == pytest.approx(1)
    assert exact.weights.bounds.gap.value == pytest.approx(0, abs=1e-8)
    assert exact.n_calls == 50 * 31
    assert exact.structure.bonds.share == 0
    np.testing.assert_allclose(exact.structure.bond_sd_ratio, 1, atol=0.2)


def test_forward_ess_of_two_gaussians(rng):
    """p = N(0, 1), q = N(t, c²): 1/E_q[(p/q)²] in closed form; ln Z is known to be 0."""
    t, c = 0.3, 1.2
    x, y = rng.standard_normal(200_000), t + c * rng.standard_normal((1, 200_000))

    def log_weight(z):
        return -0.5 * z**2 + 0.5 * ((z - t) / c) ** 2 + np.log(c)

    exact = np.sqrt(2 * c**2 - 1) / c**2 * np.exp(-(t**2) / (2 * c**2 - 1))
    measured = forward_effective_sample_size(log_weight(y), log_weight(x)[None])
    assert measured == pytest.approx(exact, abs=0.005)


def test_only_frames_see_a_missing_mode(rng):
    """p has two modes of equal weight, q = one of them: its own samples look perfect."""
    n, distance = 4000, 20.0
    frames = rng.standard_normal(n) + distance * (np.arange(n) % 2)
    samples = rng.standard_normal((n, 8))

    def log_weight(x):
        p = np.logaddexp(-0.5 * x**2, -0.5 * (x - distance) ** 2)
        return p + 0.5 * x**2

    own, at_frames = log_weight(samples), log_weight(frames)[:, None]
    assert ccg_mda.effective_sample_size(own, axis=1).min() > 0.999
    assert forward_effective_sample_size(own, at_frames) < 1e-6
    assert sandwich(own, at_frames).gap.value > 50
    assert forward_effective_sample_size(np.full((n, 8), -np.inf), at_frames) == 0


def test_energies_of_frames_save_calls_and_batches_change_nothing(molecule, frames):
    flow = GaussianBackmapper(molecule, **DISTORTION)
    energies = molecule(frames)[0]
    one = diagnose(flow, frames, molecule, 30, 20, seed=3)
    two = diagnose(flow, frames, molecule, 30, 20, seed=3, energies=energies, batch_size=7)
    assert (one.n_calls, two.n_calls) == (30 * 21, 30 * 20)
    for name, value in one.summary().items():
        assert two.summary()[name] == pytest.approx(value, rel=1e-6, nan_ok=True), name
    other = diagnose(flow, frames, molecule, 30, 20, seed=4)
    assert other.summary()["ess_mean"] != one.summary()["ess_mean"]


def test_without_a_potential_there_is_structure_only(molecule, frames):
    report = diagnose(GaussianBackmapper(molecule), frames, None, 20, 10)
    assert (report.weights, report.n_calls) == (None, 0)
    assert "ess_mean" not in report.summary()
    assert report.structure.n_frames == 200
    assert report.coverage.n_states == 20
    text = str(report)
    assert "bond length outliers" in text
    assert "torsion at given s" in text


class Boxed(GaussianBackmapper):
    """Wants the cell vectors of every state, or of all."""

    def forward(self, beads, *, box, temperature_K=None):
        if box.ndim == 3:  # the box of each frame is as wide as its first bead is far
            torch.testing.assert_close(box[:, 0, 0], 50 + beads[:, 0, 0])
        torch.testing.assert_close(box[..., 1, 1], torch.full(box.shape[:-2], 60.0).double())
        return super().forward(beads)


@pytest.mark.parametrize("each", [False, True])
def test_boxes_go_with_their_frames(molecule, frames, each):
    x = frames - frames.mean(1, keepdims=True)
    box = np.array([50.0, 60, 70, 90, 90, 90])
    if each:
        box = np.repeat(box[None], len(x), axis=0)
        box[:, 0] += x[:, 0, 0]
    flow = Boxed(molecule, **DISTORTION)
    inside = diagnose(flow, x, molecule, 20, 30, box=box, batch_size=100)
    free = diagnose(GaussianBackmapper(molecule, **DISTORTION), x, molecule, 20, 30)
    for name, value in free.summary().items():
        assert inside.summary()[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_errors_name_the_cause(molecule, frames):
    flow = GaussianBackmapper(molecule)
    with pytest.raises(ValueError, match=r"expected frames of shape \(n, 8, 3\)"):
        diagnose(flow, frames[:, :7])
    with pytest.raises(ValueError, match="at least two states and samples"):
        diagnose(flow, frames, n_samples=1)


# -------------------------------------------------------------------- torsions


def two_rotamers(rng, share, shape):
    """Torsions around -60° or 60°, the latter with probability `share`, and 10° of spread."""
    sign = np.where(rng.random(shape) < share, 1, -1)
    return sign * np.pi / 3 + rng.normal(scale=np.pi / 18, size=shape)


def cover(samples, frames, **options):
    return torsion_coverage(("χ",), samples[..., None], frames[..., None], **options)


def test_right_samples_lie_at_the_floor(rng):
    found = [
        cover(two_rotamers(rng, 0.3, (300, 50)), two_rotamers(rng, 0.3, 300)) for _ in range(30)
    ]
    for name in ("divergence", "uncovered"):
        value = np.array([getattr(each, name)[0] for each in found])
        floor = np.mean([getattr(each, f"{name}_floor")[0] for each in found])
        assert abs(value.mean() - floor) < 4 * value.std() / np.sqrt(30)
        assert floor > 0


def test_a_missing_rotamer_is_uncovered(rng):
    frames = two_rotamers(rng, 0.3, 1000)
    found = cover(two_rotamers(rng, 0.0, (1000, 50)), frames)
    assert found.uncovered[0] == pytest.approx(np.mean(frames > 0), abs=0.03)
    assert found.uncovered_floor[0] < 0.03
    # Divergence of (1-a, a) from (1, 0), whatever the shape of the rotamers.
    a = np.mean(frames > 0)
    exact = jensen_shannon(np.array([1 - a, a]), np.array([1.0, 0.0]))
    assert found.divergence[0] == pytest.approx(exact, abs=0.02)
    assert found.divergence[0] > 10 * found.divergence_floor[0]
    assert found.summary()["torsion_uncovered"] == found.uncovered[0]
    assert found.rows()[0][0] == "χ"


def test_rotamers_at_the_wrong_s_are_uncovered(rng):
    """Pooled histograms agree, but each s has the rotamer of another one."""
    state = np.arange(1000) % 2
    frames = two_rotamers(rng, state, 1000)
    right = cover(two_rotamers(rng, state[:, None], (1000, 50)), frames)
    wrong = cover(two_rotamers(rng, 1 - state[:, None], (1000, 50)), frames)
    assert right.uncovered[0] < 0.03
    assert wrong.uncovered[0] > 0.99
    assert wrong.divergence[0] < 2 * wrong.divergence_floor[0]


def test_weights_correct_the_divergence(rng):
    """Samples of even shares, frames of 0.2: the ratio of shares as weights repairs it."""
    samples, frames = two_rotamers(rng, 0.5, (2000, 50)), two_rotamers(rng, 0.2, 2000)
    plain = cover(samples, frames)
    weighted = cover(samples, frames, log_weight=np.log(np.where(samples > 0, 0.2, 0.8)))
    assert plain.divergence[0] > 5 * plain.divergence_floor[0]
    assert weighted.divergence[0] < 2 * weighted.divergence_floor[0]


def test_like_atoms_are_not_told_apart(rng):
    """A methyl group that the data hold at one labelling, and the samples at another."""
    frames, samples = rng.normal(0, 0.1, 500), rng.normal(2 * np.pi / 3, 0.1, (500, 50))
    assert cover(samples, frames).uncovered[0] == 1
    folded = cover(samples, frames, fold=np.array([3]))
    assert folded.uncovered[0] < 0.05
    assert folded.divergence[0] < 0.01


def test_torsions_fixed_by_s_are_left_out(rng):
    frames = rng.uniform(-np.pi, np.pi, (20, 2))
    samples = np.repeat(frames[:, None], 5, axis=1)
    samples[:, :, 1] += rng.normal(size=(20, 5))
    samples[..., 0] += 2 * np.pi
    assert torsion_coverage(("φ", "χ"), samples, frames).names == ("χ",)
    assert torsion_coverage(("φ",), samples[..., :1], frames[:, :1]).summary() == {"torsions": 0.0}
    with pytest.raises(ValueError, match="need 1 torsions"):
        torsion_coverage(("φ",), samples, frames)


def test_jensen_shannon_along_an_axis(rng):
    p, q = rng.dirichlet(np.ones(COVERAGE_BINS), (2, 5))
    rows = [jensen_shannon(a, b) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(jensen_shannon(p, q, axis=1), rows)
    assert jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx(np.log(2))


def test_the_probe_is_the_plain_check_in_pieces(ala2_topology, ala2_positions, rng):
    frames = ala2_positions + rng.normal(scale=0.02, size=(6, 22, 3))
    samples = ala2_positions + rng.normal(scale=0.03, size=(6, 10, 22, 3))
    reference = StructureReference.from_frames(ala2_topology, frames)
    probe = StructureProbe(reference, 6, 10)
    box = np.array([40.0, 40, 40, 90, 90, 90])
    for part in (slice(0, 2), slice(2, 6)):
        probe.add(samples[part], frames[part], box)
    structure, coverage = probe.finish()
    assert structure.summary() == check_structure(reference, samples, box).summary()
    assert coverage.names[0] == "H1-CH3-C-N (ACE 1)"
    assert (coverage.n_states, coverage.n_samples) == (6, 10)

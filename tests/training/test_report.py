"""The report: figures from arrays, verdicts against data of known quality, one closed page."""

import base64
import re

import numpy as np
import pytest

from ccg_mda.diagnostics import StructureProbe, WeightQuality
from ccg_mda.structure import StructureReference
from ccg_training import figures, figures_run
from ccg_training.progress import Progress
from ccg_training.report import PLATES, TABLES, ReportError, read_metrics, render, write_report
from ccg_training.report_data import ReportData
from ccg_training.stages import Stages
from ccg_training.turn_check import turn_row
from ccg_training.verdicts import headline, judge

KT = 8.617333e-5 * 300


def torsions(rng, n, shift=0.0):
    basin = rng.random(n) < 0.7
    phi = np.where(basin, rng.vonmises(-1.4 + shift, 8, n), rng.vonmises(1.0 + shift, 8, n))
    return np.stack([phi, rng.vonmises(2.0, 4, n)], axis=1)


def made(n=40_000, **changes):
    """Data of a model that is right in every respect."""
    rng = np.random.default_rng(0)
    bonds = rng.normal([1.33, 1.47], 0.03, (n, 2))
    angles = rng.normal(2.1, 0.05, (n, 1))
    values = dict(
        name="two <basins>",
        torsion_names=("φ", "ψ"),
        torsions_reference=torsions(rng, n),
        torsions_beads=torsions(rng, n),
        torsions_atomistic=torsions(rng, n),
        log_weights=rng.normal(-700, 0.3, n),
        surface=np.ones((8, 8)),
        surface_error=np.ones((8, 8)),
        surface_labels=np.zeros((5, 2)),
        bond_names=("C-N", "N-CA"),
        bonds_reference=bonds,
        bonds_beads=rng.permutation(bonds),
        angle_names=("C-N-CA",),
        angles_reference=angles,
        angles_beads=rng.permutation(angles),
        energy_reference=rng.normal(-1, 0.1, n),
        energy_atomistic=rng.normal(-1, 0.1, n),
        ess=rng.beta(9, 2, 400),
        ess_iteration=np.repeat([1, 2], 200),
        ess_rare=np.arange(400) % 10 == 0,
        label_variance_slice=rng.lognormal(0, 0.3, 200),
        label_variance=rng.lognormal(-7, 0.3, 200),
        residual_forward=rng.normal(0, 0.3, 500),
        residual_reverse=rng.normal(0.1, 0.3, 500),
        weight_table=np.array([["gap between bounds of ln Z", "0.1 ± 0.02 nats", "0 is perfect"]]),
        structure_table=np.array([["clashes, per atom", "22", "0.010%", "0.20%", "H1 <and> H2"]]),
        turn_table=np.array([["1", *9 * "–"], ["2", *9 * "–"]]),
        turn_calls=np.array([1e6, 1.05e6]),
        turn_accepted=np.array([0.6, 0.95]),
        turn_ess=np.array([0.7, 0.8]),
        turn_free_energy_error=np.array([np.nan, 0.1]),
        turn_force_error=np.array([0.1, 0.05]),
        end_of_loop=("targets met", "all <targets> were met"),
        stage_names=("reference data", "fit flow", "reconstruct"),
        stage_iteration=np.array([0, 0, 1]),
        stage_seconds=np.array([10.0, 20, 3]),
        stage_calls=np.array([1e6, 0, 5e4]),
        picture_beads=np.eye(4)[:, :3],
        picture_bead_bonds=np.array([[0, 1], [1, 2]]),
        picture_atoms=rng.normal(size=(3, 5, 3)),
        picture_atom_bonds=np.array([[0, 1], [1, 2], [2, 3], [3, 4]]),
        picture_elements=("C", "N", "O", "H", "Zn"),
    )
    return ReportData(**values | changes)


@pytest.fixture(scope="module")
def good():
    return made()


def answers(data):
    return {verdict.claim: verdict.answer for verdict in judge(data)}


def test_a_right_model_is_trusted_for_everything(good):
    verdicts = judge(good)
    assert {verdict.answer for verdict in verdicts} == {"yes"}, verdicts
    assert headline(verdicts).startswith("Trust this model for free energies from bead dynamics, ")
    assert "noise floor" in verdicts[0].reason


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("Free energies from bead dynamics", {"torsions_beads": "shifted"}),
        ("Free energies from reweighted atoms", {"torsions_atomistic": "shifted"}),
        ("Bead bonds and angles", {"bonds_beads": 1.5}),
        ("Atoms at common states", {"ess": 0.05}),
        ("Atoms at rare states", {"ess": 0.05}),
        ("All-atom energies after reweighting", {"energy_atomistic": 3 * KT}),
        ("The all-atom ensemble after reweighting", {"log_weights": 8.0}),
        ("Mean-force labels", {"label_variance": 5.0}),
        ("Free energies at new states", {"turn_free_energy_error": np.array([0.1, 1.2])}),
        ("Free energies at new states", {"turn_accepted": np.array([0.9, 0.4])}),
        ("Convergence of the loop", {"end_of_loop": ("wall time", "it took an hour")}),
    ],
)
def test_each_claim_fails_with_its_own_data(good, claim, changes):
    (name, change), *_ = changes.items()
    value = getattr(good, name)
    if name == "end_of_loop" or name.startswith("turn"):
        value = change
    elif change == "shifted":
        value = torsions(np.random.default_rng(5), len(value), shift=0.6)
    elif name in ("ess", "label_variance"):
        value = np.full_like(value, change)
    elif name == "energy_atomistic":
        value = value + change
    else:
        value = value.mean(axis=0) + change * (value - value.mean(axis=0))
    assert answers(made(**{name: value}))[claim] == "no"


def test_targets_met_count_only_if_the_held_out_check_agrees():
    rare_fail = made(ess_rare=np.arange(400) % 2 == 0, ess=np.where(np.arange(400) % 2, 0.9, 0.01))
    verdict = judge(rare_fail)[-1]
    assert verdict.answer == "with care"
    assert "Atoms at rare states" in verdict.reason
    assert "Converged" not in verdict.reason


def test_biased_reference_data_say_nothing_of_populations(good):
    before, after = answers(good), answers(made(biased=True))
    changed = {claim for claim in before if after[claim] != before[claim]}
    assert {after[claim] for claim in changed} == {"not measured"}
    assert changed == {
        "Free energies from bead dynamics",
        "Free energies from reweighted atoms",
        "Bead bonds and angles",
        "All-atom energies after reweighting",
    }
    assert "biased along the coarse variables" in judge(made(biased=True))[0].reason


def test_few_samples_are_never_a_firm_yes():
    rng = np.random.default_rng(1)
    verdict = judge(made(torsions_beads=torsions(rng, 60)))[0]
    assert verdict.answer != "yes"


def test_correlated_samples_raise_the_floor_until_bins_are_coarser(good):
    def floor_and_bins(data):
        found = re.search(r"samples is ([\d.]+) \((\d+) bins", judge(data)[0].reason)
        return float(found[1]), int(found[2])

    floor, bins = floor_and_bins(good)
    assert bins == 64
    correlated = floor_and_bins(made(independent_reference=25e3, independent_beads=25e3))
    assert correlated[0] == pytest.approx(floor * 40 / 25, rel=0.2)
    assert floor_and_bins(made(independent_reference=9e3, independent_beads=9e3))[1] == 32


def test_reconstructions_of_one_state_count_once(good):
    """Every frame four times, as four reconstructions: no figure may gain from that."""
    few, again = {}, {}
    for name in ("torsions_atomistic", "log_weights", "energy_atomistic"):
        few[name] = getattr(good, name)[:10_000]
        again[name] = np.repeat(few[name], 4, axis=0)
    again["atomistic_state"] = np.repeat(np.arange(10_000), 4)
    once, repeated = judge(made(**few)), judge(made(**again))
    for claim in (4, 5):
        assert once[claim].reason.split("Effective")[0] == repeated[claim].reason.split("Eff")[0]


def test_iterations_may_have_names():
    data = made(ess_labels=("1", "held out"))
    assert "(held out)" in judge(data)[2].reason
    assert "held out" in figures.effective_sizes(data).axes[0].get_xlabel()


def test_reweighting_is_used():
    """Draw from a shifted ensemble with its exact weights: right after reweighting only."""
    rng = np.random.default_rng(2)
    energy = rng.normal(-0.95, 0.1, 40_000)
    log_weights = -(((energy + 1) ** 2) - (energy + 0.95) ** 2) / (2 * 0.1**2)
    claim = "All-atom energies after reweighting"
    assert answers(made(energy_atomistic=energy, log_weights=log_weights))[claim] == "yes"
    assert answers(made(energy_atomistic=energy))[claim] == "no"


@pytest.mark.parametrize("n_torsions", [1, 2])
def test_over_torsions_nothing_is_claimed_of_beads(good, n_torsions):
    empty = {
        name: getattr(ReportData(), name)
        for name in vars(good)
        if re.search("bead|torsions_", name)
    }
    one = {name: getattr(good, name)[0] for name in ("surface", "surface_error")}
    one |= {"surface_labels": good.surface_labels[:, :1], "torsion_names": ("φ",)}
    data = made(**empty | (one if n_torsions == 1 else {}), by_torsions=True)
    assert answers(data) == {
        "Free energies at new states": "yes",
        "Atoms at common states": "yes",
        "Atoms at rare states": "yes",
        "Convergence of the loop": "yes",
    }
    assert "Free energy between the labels</h2>" in render(data, [])


def test_missing_data_are_said_to_be_missing():
    verdicts = judge(ReportData())
    assert {verdict.answer for verdict in verdicts} == {"not measured"}
    assert headline(verdicts).startswith("Not measured: ")
    assert all(plate.draw(ReportData()) is None for plate in PLATES)
    assert "not measured" in render(ReportData(), [])


def test_report_data_round_trip(good, tmp_path):
    good.save(tmp_path / "d.npz")
    again = ReportData.load(tmp_path / "d.npz")
    assert (again.name, again.torsion_names, again.temperature_K) == (good.name, ("φ", "ψ"), 300.0)
    np.testing.assert_array_equal(again.ess_rare, good.ess_rare)
    np.testing.assert_array_equal(again.torsions_beads, good.torsions_beads)


def test_lengths_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="one row per reconstructed frame"):
        ReportData(log_weights=np.zeros(3), energy_atomistic=np.zeros(4))


@pytest.fixture(scope="module")
def page(good, tmp_path_factory):
    """The report of a run directory: its folder and text."""
    folder = tmp_path_factory.mktemp("run")
    good.save(folder / "report_data.npz")
    (folder / "metrics.jsonl").write_text('{"stage": "fit", "nll": 69.8}\n{"stage": "cu')
    (folder / "config.toml").write_text("[system]\n# a < b\n")
    return folder, write_report(folder).read_text()


def test_the_page_is_one_closed_file(page):
    folder, page = page
    assert page.index("Trust this model") < page.index("<img")
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "two &lt;basins&gt;" in page
    assert "a &lt; b" in page
    assert "nll=69.8" in page
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == len(PLATES)
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert len(list((folder / "figures").iterdir())) == len(PLATES)


def test_tables_are_shown_where_there_are_rows(page):
    _, page = page
    assert "Structure of the reconstructions" in page
    assert "<td>0.010%</td><td>0.20%</td><td>H1 &lt;and&gt; H2</td>" in page
    assert "0.1 ± 0.02 nats" in page
    assert "Torsions at given bead state" not in page  # its table is empty
    assert "Structure of the reconstructions" not in render(ReportData(), [])


def test_fits_of_the_flow_and_what_it_holds_are_shown():
    names = [f"bond ALA{k}:N-ALA{k}:H" for k in range(25)]
    likelihood = {"stage": "flow: likelihood", "iteration": 0, "nll": 1.0}
    likelihood |= {"held": names, "fit": "stopped early at step 40, kept the weights of step 20"}
    forces = {"stage": "flow", "iteration": 1, "fit": "ran to the end at step 9"}
    page = render(ReportData(), [likelihood, forces])
    page = page[: page.index("Metrics of the run")]
    assert "stopped early at step 40" in page
    assert ">turn 1<" in page
    assert "ran to the end at step 9" in page
    assert "bond ALA0:N-ALA0:H, " in page
    assert "bond ALA19:N-ALA19:H and 5 more. They never move" in page
    assert "mass-metric factor" in page
    assert "Nothing: all bonds" in render(ReportData(), [likelihood | {"held": []}])
    older = {"stage": "flow: likelihood", "iteration": 0, "nll": 1.0}
    assert "The flow</h2>" not in render(ReportData(), [older, {"stage": "cut"}, {"nll": 2.0}])


def test_fits_of_the_force_field_are_shown_with_their_noise():
    fit = {
        "loss": 1.0321, "loss_noise": 0.9876, "force_error": 0.0123, "force_resolution": 0.004,
        "prior_explains": 0.913, "model_explains": 0.9991,
    }  # fmt: skip
    records = [{"stage": "force field", "iteration": k, **fit} for k in (0, 2)]
    records.append({"stage": "flow", "iteration": 2, "fit": "all 100 steps"})
    page = render(ReportData(), records)
    page = page[: page.index("Metrics of the run")]
    for told in ("first fit", "turn 2", "1.032", "0.9876", "0.0123", "91.3%", "99.91%"):
        assert told in page
    page = render(ReportData(), [records[0] | {"loss_noise": None}])
    page = page[: page.index("Metrics of the run")]
    assert "Their noise, unknown, is most of the 0.0123 eV/Å" in page


def test_every_table_has_as_many_columns_as_its_header(ala2_topology, ala2_positions):
    rng = np.random.default_rng(0)
    x = ala2_positions + rng.normal(scale=0.02, size=(4, 3, 22, 3))
    probe = StructureProbe(StructureReference.from_frames(ala2_topology, x[:, 0]), 4, 3)
    probe.add(x, x[:, 0])
    structure, coverage = probe.finish()
    quality = WeightQuality.from_log_weights(rng.normal(size=(4, 30)), rng.normal(size=(4, 1)))
    labels = {"stage": "labels at new states", "states": 5, "accepted": 4, "ess_mean": None}
    check = {"stage": "turn check", "new_F_error_kT": 0.1, "new_force_error": None}
    check |= {"flow_gain_nats": 0.2, "force_field_gain": 0.3}
    turns = [record | {"iteration": 1, "calls": 7, "seconds": 60} for record in (labels, check)]
    row = turn_row(turns, 1)
    assert list(row.values()) == ["5", "80%", "–", "0.10", "–", "0.200", "30%", "14", "2.0"]
    found = ([("1", *row.values())] * 5, quality.rows(), structure.rows(), coverage.rows())
    for table, rows in zip(TABLES, found, strict=True):
        assert len(rows) >= 5
        assert {len(row) for row in rows} == {len(table.header)}, table.name


def test_a_run_without_data_is_an_error(tmp_path):
    with pytest.raises(ReportError, match=r"report_data\.npz"):
        write_report(tmp_path)


def test_broken_metrics_are_an_error_unless_at_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"b"')
    assert read_metrics(path) == [{"a": 1}]
    path.write_text('{"b"\n{"a": 1}\n')
    with pytest.raises(ReportError, match="line 1"):
        read_metrics(path)


def test_one_torsion_is_drawn_as_a_profile(good):
    one = made(
        torsion_names=("φ",),
        torsions_reference=good.torsions_reference[:, :1],
        torsions_beads=good.torsions_beads[:, :1],
        torsions_atomistic=good.torsions_atomistic[:, :1],
    )
    figure = figures.free_energy_maps(one)
    assert [line.get_label() for line in figure.axes[0].lines] == [
        "reference",
        "bead dynamics",
        "reweighted atoms",
    ]
    assert set(answers(one).values()) == {"yes"}


def test_maps_show_the_free_energy_that_was_put_in(good):
    panel = figures.free_energy_maps(good).axes[0]
    energy = panel.images[0].get_array().filled(np.nan)
    row, column = np.unravel_index(np.nanargmin(energy), energy.shape)
    bins = len(energy)
    phi, psi = ((np.array([column, row]) + 0.5) / bins) * 2 * np.pi - np.pi
    assert abs(phi + 1.4) < 0.2
    assert abs(psi - 2.0) < 0.2


def test_the_picture_is_not_mirrored():
    """Signed volume of four beads, seen along z towards the viewer, keeps its sign."""
    beads = np.array([[0.0, 0, 0], [2, 0, 0], [0, 1.5, 0], [0, 0, 1.0]])
    data = made(picture_beads=beads, picture_atoms=beads[None], picture_atom_bonds=np.zeros((0, 2)))
    figure = figures_run.picture(data)
    drawn = figure.axes[0].collections[-1].get_offsets().data
    a, b = drawn[1] - drawn[0], drawn[2] - drawn[0]
    assert a[0] * b[1] - a[1] * b[0] != 0
    assert len(figure.axes) == 3


def test_what_is_no_number_is_null_in_metrics(tmp_path):
    stages = Stages(tmp_path, Progress(quiet=True))
    stages.run("fit", lambda stage: {"noise": float("nan"), "all": [1.0, {"x": float("inf")}]})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["noise"] is None
    assert record["all"] == [1.0, {"x": None}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()

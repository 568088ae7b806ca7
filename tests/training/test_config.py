"""The TOML file: defaults, paths, round trip, and errors that say where and what."""

from pathlib import Path
from typing import get_args

import openmm
import pytest

from ccg_mda.potential import OpenMMPotential
from ccg_training.config import Config, ConfigError
from ccg_training.config_models import Flow
from ccg_training.fit_flow import FlowLoss
from ccg_training.reference import ReferenceDataError, read_structure
from ccg_training.system import openmm_potential_of

PDB = Path(__file__).parents[2] / "examples" / "alanine_dipeptide" / "alanine_dipeptide.pdb"

MINIMAL = '[system]\ntopology = "molecule.pdb"\n[mapping]\npreset = "ca"\n'


@pytest.fixture
def write(tmp_path):
    (tmp_path / "molecule.pdb").write_text("END\n")

    def write(text):
        path = tmp_path / "cycle.toml"
        path.write_text(text)
        return path

    return write


def test_defaults_and_paths_relative_to_the_file(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    config = Config.load(write(MINIMAL))
    assert config.system.topology == tmp_path / "molecule.pdb"
    assert config.system.name == "molecule"
    assert config.run.directory == tmp_path / "runs" / "molecule"
    assert config.system.temperature_K == 300.0
    assert config.potential.forcefield == ["amber96.xml", "amber96_obc.xml"]


def test_integers_are_accepted_as_floats(write):
    text = MINIMAL.replace("[mapping]", "temperature_K = 310\n[mapping]")
    assert Config.load(write(text)).system.temperature_K == 310.0


def test_toml_round_trip_keeps_every_value_and_the_order_of_beads(write, tmp_path):
    text = '[system]\ntopology = "molecule.pdb"\n[mapping.beads]\nN = "name N"\n"C a" = "name CA"\n'
    config = Config.load(write(text))
    for comments in (True, False):
        again = Config.load(write(config.to_toml(comments=comments)))
        assert again == config
        assert list(again.mapping.beads) == ["N", "C a"]
        assert config.differences(again) == []


def test_every_key_is_described():
    for section in Config.model_fields.values():
        for name, field in section.annotation.model_fields.items():
            assert field.description, name


def test_every_loss_of_the_flow_exists_and_needs_what_a_run_has():
    field = Flow.model_fields["loss"]
    names = get_args(field.annotation)
    assert field.description == " | ".join(names)
    for name in names:
        assert not FlowLoss.named(name).needs_samples


def test_differences_name_the_key_and_see_the_order_of_beads(write):
    first = Config.load(write(MINIMAL))
    second = Config.load(write(MINIMAL + "[flow]\nwidth = 32\n[run]\nthreads = 7\n"))
    assert first.differences(second, ignore=("run.threads",)) == ["flow.width: 64 -> 32"]
    head = '[system]\ntopology = "molecule.pdb"\n[mapping.beads]\n'
    one = Config.load(write(head + 'A = "name N"\nB = "name C"\n'))
    two = Config.load(write(head + 'B = "name C"\nA = "name N"\n'))
    assert len(one.differences(two)) == 1


def test_torsions_and_weighting(write):
    head = '[system]\ntopology = "molecule.pdb"\n'
    row = '["name C", "name N", "name CA", "name C"]'
    config = Config.load(write(head + f"[mapping.torsions]\nphi = {row}\npsi = {row}\n"))
    assert list(config.mapping.torsions) == ["phi", "psi"]
    assert Config.load(write(config.to_toml())) == config
    config = Config.load(
        write(head + '[mapping]\npreset = "residue-com"\nweighting = "geometry"\n')
    )
    assert Config.load(write(config.to_toml())) == config
    beads = '[mapping]\nper = "residue"\n[mapping.beads]\nBB = "backbone"\nSC = "name CB"\n'
    config = Config.load(write(head + beads))
    assert config.mapping.per == "residue"
    assert Config.load(write(config.to_toml())) == config
    with pytest.raises(ConfigError, match="'per' goes with 'beads'"):
        Config.load(write(head + '[mapping]\npreset = "ca"\nper = "residue"\n'))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "[flow]\nwidht = 3\n", r"line 6, \[flow\]: unknown key 'widht'.*'width'"),
        (MINIMAL + "[forcefield]\nx = 1\n", r"line 5, .*unknown section.*'force_field'"),
        (MINIMAL + "[flow]\nwidth = 0\n", r"line 6, \[flow\]: width: .*greater than 0"),
        (MINIMAL + '[flow]\nwidth = "3"\n', r"line 6, \[flow\]: width: .*valid integer"),
        (MINIMAL + "[flow]\nlearning_rate = nan\n", r"learning_rate: .*finite"),
        (MINIMAL.replace("molecule.pdb", "no.pdb"), r"line 2, \[system\]: topology: no such file"),
        ('[mapping]\npreset = "ca"\n', r"\[system\]: the section is missing"),
        ("[system]\n" + MINIMAL[MINIMAL.index("[map") :], r"\[system\]: 'topology' is missing"),
        (MINIMAL + '[mapping.beads]\nA = "name A"\n', r"\[mapping\]: give exactly one"),
        (MINIMAL.replace('preset = "ca"', ""), r"line 3, \[mapping\]: give exactly one"),
        (MINIMAL.replace('"ca"', '"alpha"'), r"\[mapping\]: preset: .*'backbone'"),
        (MINIMAL + '[reference]\nsource = "trajectory"\n', r"\[reference\]: .*needs files"),
        (MINIMAL + '[potential]\nforcefield = ["amber69.xml"]\n', r"did you mean 'amber96.xml'"),
        (MINIMAL + "[flow\n", r"cycle.toml is not valid TOML: .*line 5"),
    ],
)
def test_errors_say_where_and_what(write, text, message):
    with pytest.raises(ConfigError, match=message):
        Config.load(write(text))


def test_all_faults_are_reported_at_once(write):
    with pytest.raises(ConfigError) as error:
        Config.load(write(MINIMAL + "[flow]\nwidht = 3\nhops = 0\n"))
    assert len(str(error.value).splitlines()) == 2


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match="ccg init"):
        Config.load(tmp_path / "no.toml")


def test_a_force_field_beside_the_file_is_resolved(write, tmp_path):
    (tmp_path / "mine.xml").write_text("<ForceField/>")
    config = Config.load(write(MINIMAL + '[potential]\nforcefield = ["mine.xml"]\n'))
    assert [Path(name) for name in config.potential.forcefield] == [tmp_path / "mine.xml"]


def test_a_system_from_a_file_takes_the_place_of_a_force_field(write, tmp_path):
    shipped = OpenMMPotential.from_pdb(PDB, ["amber96.xml", "amber96_obc.xml"])
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(shipped.system))
    molecule = MINIMAL.replace("molecule.pdb", str(PDB))
    config = Config.load(write(molecule + '[potential]\nsystem = "system.xml"\n'))
    positions = read_structure(PDB).atoms.positions
    assert openmm_potential_of(config)(positions)[0] == shipped(positions)[0]
    assert Config.load(write(config.to_toml())).potential == config.potential
    both = '[potential]\nsystem = "system.xml"\nforcefield = ["amber96.xml"]\n'
    with pytest.raises(ConfigError, match="not both"):
        Config.load(write(MINIMAL + both))
    with pytest.raises(ConfigError, match="give forcefield, or system"):
        Config.load(write(MINIMAL + "[potential]\nforcefield = []\n"))
    larger = openmm.System()
    for _ in range(23):
        larger.addParticle(1.0)
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(larger))
    with pytest.raises(ReferenceDataError, match="has 23 atoms"):
        openmm_potential_of(config)


def test_the_configuration_is_read_only(write):
    with pytest.raises(ValueError, match="frozen"):
        Config.load(write(MINIMAL)).flow.width = 3

"""When the loop ends, and why: from records alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccg_training.config import Config
from ccg_training.stopping import calls_left, records_upto, reserved_calls, stop

TOPOLOGY = Path(__file__).parents[2] / "examples" / "alanine_dipeptide" / "alanine_dipeptide.pdb"


def configured(iterations=5, **settings):
    sections = {
        "system": {"topology": TOPOLOGY},
        "mapping": {"preset": "backbone"},
        "cycle": {"iterations": iterations, "n_states": 100, "n_samples": 10},
        "stop": settings,
    }
    return Config.build(sections, TOPOLOGY.parent)


def record(stage, turn, **figures):
    return {"stage": stage, "iteration": turn, "calls": 0, "seconds": 0.0} | figures


def turn(k, *, accepted=50, ess=0.4, error=0.5, flow=0.1, force_field=0.1, seconds=60.0):
    return [
        record("labels at new states", k, states=100, accepted=accepted, ess_mean=ess, calls=1000),
        record(
            *("turn check", k),
            new_F_error_kT=error,
            flow_gain_nats=flow,
            force_field_gain=force_field,
            seconds=seconds,
        ),
    ]


START = [record("reference data", 0, calls=100_000, seconds=600.0)]


def reason(config, *turns):
    found = stop(config, [*START, *(r for part in turns for r in part)], len(turns))
    return found and found.reason


def test_the_loop_goes_on_while_it_gains_and_may_spend():
    assert reason(configured()) is None
    assert reason(configured(), turn(1), turn(2)) is None
    assert reason(configured(2), turn(1), turn(2)) == "turns"


@pytest.mark.parametrize("missed", [{"accepted": 80}, {"ess": 0.3}, {"error": 0.3}])
def test_every_target_must_be_met(missed):
    met = {"accepted": 95, "ess": 0.6, "error": 0.1}
    assert reason(configured(), turn(1, **met)) == "targets met"
    assert reason(configured(), turn(1, **met | missed)) is None
    assert reason(configured(), turn(1, **met | {"error": None})) is None


def test_turns_without_gain_end_it_after_patience():
    poor = {"flow": -0.2, "force_field": 0.001}
    assert reason(configured(), turn(1), turn(2, **poor)) is None
    assert reason(configured(), turn(1, **poor), turn(2, **poor)) == "no further gain"
    assert reason(configured(), turn(1, **poor), turn(2, **poor | {"flow": 0.1})) is None
    assert reason(configured(patience=1), turn(1, **poor)) == "no further gain"


def test_calls_are_kept_for_the_final_check():
    config = configured(max_calls=130_000)
    reserved = reserved_calls(config)
    assert reserved == 2000 * 8 + 133 * 200
    assert calls_left(configured(), START) is None
    assert calls_left(config, START) == 0
    assert reason(config) == "energy calls"
    enough = configured(max_calls=100_000 + reserved + 2000)
    assert calls_left(enough, START + turn(1)) == 1000
    assert reason(enough, turn(1)) is None
    assert reason(enough, turn(1), turn(2)) == "energy calls"


def test_a_turn_that_may_not_fit_is_not_begun():
    hours = (600 + 60 + 59) / 3600
    assert reason(configured(max_hours=hours), turn(1)) == "wall time"
    assert reason(configured(max_hours=hours + 0.001), turn(1)) is None
    found = stop(configured(max_hours=hours), START + turn(1), 1)
    assert "0.18 h were spent of 0.2 h" in found.sentence
    # The final dynamics are five times as long as those of a turn.
    dynamics = [record("bead dynamics", 1, seconds=30.0), *turn(1, seconds=30.0)]
    hours = (600 + 60 + 60 + 150) / 3600
    assert reason(configured(max_hours=hours - 0.001), dynamics) == "wall time"
    assert reason(configured(max_hours=hours + 0.001), dynamics) is None


def test_a_continued_run_takes_every_decision_again_on_what_it_knew_then():
    config = configured(max_calls=130_000)
    met = turn(1, accepted=95, ess=0.6, error=0.1)
    final = [record("end of the loop", 1), record("final reconstruction", 1, calls=50_000)]
    finished = [*START, *met, *final]
    assert stop(configured(), finished, 0) is None
    assert stop(configured(), finished, 1).reason == "targets met"
    assert records_upto(finished, 1) == [*START, *met]
    # With other targets the same run goes on; what its end had cost was spent.
    further = [*finished, *turn(2)]
    assert stop(configured(target_ess=0.9), further, 1) is None
    assert calls_left(config, records_upto(further, 2)) == 0

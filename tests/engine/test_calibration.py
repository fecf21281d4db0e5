"""The calibration: kept, made anew for another machine, refused where others may write it; never in the way."""

import json
import os

import pytest

import cfmerge
from cfmerge.engine import calibration
from cfmerge.engine.placement import placement_of
from cfmerge.planning.prediction import Rates

FAKE = Rates(**dict.fromkeys(Rates._fields, 1000000000.0) | {"cores": 2, "on_host": True, "start": 2.0, "memory": 1e8})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache directory, and a list that grows with every measurement, which is not really made."""
    monkeypatch.setenv("CFMERGE_CACHE", str(tmp_path / "cache"))
    made = []
    monkeypatch.setattr(calibration, "measured", lambda placement, folder: made.append(placement) or FAKE)
    return tmp_path / "cache", made


def rates_file(cache):
    (file,) = cache.rglob("rates.json")
    return file


def test_a_calibration_is_made_once_and_kept(cache):
    folder, made = cache
    assert calibration.calibrated(placement_of()) == (FAKE, "")
    assert calibration.calibrated(placement_of()) == (FAKE, "")
    assert len(made) == 1
    assert rates_file(folder).parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("spoil", ["version", "number", "json", "field"])
def test_a_calibration_of_another_version_or_that_is_spoiled_is_made_anew(cache, spoil):
    folder, made = cache
    calibration.calibrated(placement_of())
    file = rates_file(folder)
    content = json.loads(file.read_text())
    if spoil == "version":
        content["key"]["jax"] = "0.0.1"
    elif spoil == "number":
        content["rates"]["product"] = -1.0
    elif spoil == "field":
        del content["rates"]["hash"]
    file.write_text("{" if spoil == "json" else json.dumps(content))
    assert calibration.calibrated(placement_of()) == (FAKE, "")
    assert len(made) == 2


@pytest.mark.skipif(os.name == "nt", reason="modes")
def test_a_directory_that_others_may_write_is_not_used(cache):
    folder, made = cache
    calibration.calibrated(placement_of())
    rates_file(folder).parent.chmod(0o777)
    rates, note = calibration.calibrated(placement_of())
    assert rates == FAKE
    assert "not kept" in note
    assert "can be written by others" in note
    assert len(made) == 2


def test_a_machine_that_cannot_be_measured_stops_no_plan(cache, family, monkeypatch):
    def fails(placement, folder):
        raise OSError("no room")

    monkeypatch.setattr(calibration, "measured", fails)
    told = cfmerge.plan(family.base, family.experts, "average").forecast(None, None, None, True)
    assert told.prediction.seconds is None
    assert "no room" in told.notes[0]


def test_a_plan_without_calibration_measures_nothing(cache, family):
    plan = cfmerge.plan(family.base, family.experts, "average")
    assert plan.prediction(calibrate=False).seconds is None
    assert cache[1] == []
    assert plan.prediction().seconds > FAKE.start


@pytest.mark.long
def test_every_rate_of_a_real_calibration_is_a_positive_number(tmp_path, monkeypatch):
    monkeypatch.setenv("CFMERGE_CACHE", str(tmp_path))
    rates, note = calibration.calibrated(placement_of())
    assert note == ""
    assert all(value > 0 for value in rates if value is not True)
    assert calibration.calibrated(placement_of()) == (rates, "")

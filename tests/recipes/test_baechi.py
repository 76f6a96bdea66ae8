"""baechi: the paper's three beside one device and our own search, told as they are found, and kept in a file."""

import json

import pytest

from tightfit.recipes import Told
from tightfit.recipes.baechi import run
from tightfit.terms.errors import DoesNotFit

SMALL = {"batch": 2, "context": 64, "grain": "module", "seconds": 0.5}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    file, lines = tmp_path_factory.mktemp("placed") / "placed.json", []
    report = run("tightfit-demo", str(file), devices="2x100MiB", told=Told(finding=lines.append), **SMALL)
    return report, json.loads(file.read_text()), lines


def test_ours_is_no_worse_than_the_papers_three(ran):
    scores = ran[0].scores
    theirs = [scores[f"seconds_{name}"] for name in ("m_topo", "m_etf", "m_sct")]
    assert any(seconds > 0 for seconds in theirs)
    assert all(scores["seconds"] <= seconds * (1 + 1e-9) for seconds in theirs if seconds > 0)
    assert 1 < scores["operators_fused"] < scores["operators"]


def test_no_device_holds_more_than_it_has(ran):
    assert all(0 <= device["peak_bytes"] <= 100 * 2**20 for device in ran[1]["devices"])
    assert max(device["peak_bytes"] for device in ran[1]["devices"]) > 30 * 2**20


def test_all_is_told_and_kept(ran):
    report, kept, lines = ran
    assert [line.split(":")[0] for line in lines] == ["m-TOPO", "m-ETF", "m-SCT"]
    assert kept["scores"] == pytest.approx(dict(report.scores))
    assert set(kept["assignment"].values()) <= {0, 1}


def test_on_the_command_line(tightfit_says, tmp_path):
    given = ("--devices", "2x100MiB", "--batch", 2, "--context", 64, "--seconds", 0, "--json")
    said = tightfit_says("recipe", "baechi", "tightfit-demo", "-o", tmp_path / "placed.json", *given)
    assert said.code == 0, said.err
    assert json.loads(said.out)["scores"].keys() == json.loads((tmp_path / "placed.json").read_text())["scores"].keys()


def test_what_cannot_fit_is_refused_with_the_bytes_that_lack():
    with pytest.raises(DoesNotFit, match="together"):
        run("tightfit-demo", "nowhere.json", devices="2x10MiB", **SMALL)

"""README sections on the systems' results: any number of finished cases, unfinished cases, and significance."""

from __future__ import annotations

import copy

import pytest

from bench import mdm_evidence, readme_evidence, systems_evidence
from bench.readme_parts import load


@pytest.fixture
def stored(monkeypatch):
    """A function that replaces a study's stored summary."""

    def put(summary):
        monkeypatch.setattr(readme_evidence, "load", lambda name: {"summary": summary})

    return put


def test_every_finished_case_of_the_penalty_has_a_section_and_the_others_are_named(stored):
    case = load("mdm_evidence")["summary"]["mmmo-mfn"]
    for finished in ((), ("mosi-mult",), mdm_evidence.CASES):
        stored({name: case for name in reversed(finished)})
        text = "\n".join(readme_evidence.mdm())
        headings = [line for line in text.splitlines() if line.startswith("### ")]
        assert len(headings) == len(finished) == text.count("| arm |")
        assert ("Not finished" in text) is (len(finished) < len(mdm_evidence.CASES))
        missing = text.partition("Not finished")[2]
        assert ("MOSI, MulT" in missing) is (not finished)
    assert headings[0] == "### ICT-MMMO, MFN"  # in the order of the study, not of the file


def test_a_second_accuracy_has_a_column(stored):
    case = copy.deepcopy(load("mdm_evidence")["summary"]["mmmo-mfn"])
    for row in case["rows"]:
        row["accuracy_2"] = {"mean": 0.75, "deviation": 0.125}
    stored({"mmmo-mfn": case})
    text = "\n".join(readme_evidence.mdm())
    assert "| arm | mae | accuracy_2 | gain over weight 0 |" in text and "| 0.750 ± 0.125 |" in text


def test_significance_is_corrected_for_the_number_of_measures():
    def found(*values):
        names = ("kl", "f", "wasserstein")
        rows = [{"arm": n, "gain": {"mean": mean} | p} for n, (mean, p) in zip(names, values, strict=True)]
        return {"weights": dict.fromkeys(names, 0.1), "rows": [{"arm": "weight 0"}, *rows, {"arm": "control"}]}

    plain = readme_evidence._verdict(found((0.1, {"p": 0.02}), (0.0, {}), (-0.1, {"p": 0.5})))
    assert "No measure differs significantly" in plain and "p = 0.060" in plain
    some = readme_evidence._verdict(found((0.1, {"p": 0.01}), (0.1, {"p": 0.001}), (-0.1, {"p": 0.01})))
    assert "kl and f gain; wasserstein lose" in some and "p = 0.003" in some


def test_a_system_without_a_finished_data_set_says_so_and_nothing_else(stored):
    stored({})
    assert readme_evidence.systems("mird") == ["Not finished, and therefore without a table: MUStARD; MOSI.", ""]
    case = load("systems_evidence")["summary"]["mfm-mmmo"]
    stored({"mird-mosi": case | {"reference": "MIRD"}})
    text = "\n".join(readme_evidence.systems("mird"))
    assert "MOSI, 5 seeds." in text and "gain of MIRD over it" in text and "without a table: MUStARD." in text
    assert {name.partition("-")[0] for name in systems_evidence.CASES} == {"mfm", "mird"}

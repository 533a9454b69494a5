"""What the compatibility matrix runs and writes; the runs themselves need the network: `python -m
tests.matrix`."""

import dataclasses
import itertools

import pytest

from tests.matrix import report
from tests.matrix.rows import Combination, Result, combinations, lower_bounds, pairs

OLDEST = {"transformers": "5.1", "peft": "0.2", "bitsandbytes": "0.3", "trl": "1.4"}
RESULT = Result("2.11.0", "5.1", "0.2", "0.3", "1.4", "3.11.2", "AMD avx2", "native", 5, 0, 1, 2.5, "passed")


def test_every_choice_meets_every_other():
    everything = combinations(OLDEST, ("1.0", "2.0", "newest"))
    assert len(everything) == len(set(everything)) == 12
    chosen = pairs(everything)
    assert len(chosen) == 6 and set(chosen) <= set(everything)
    fields = [field.name for field in dataclasses.fields(Combination)]
    for left, right in itertools.combinations(fields, 2):
        met = {(getattr(item, left), getattr(item, right)) for item in chosen}
        assert met == {(getattr(item, left), getattr(item, right)) for item in everything}


def test_newest_is_asked_for_without_a_version():
    item = Combination("newest", "5.1", ("newest", "0.3", "1.4"))
    assert item.requirements == ["transformers==5.1", "peft", "bitsandbytes==0.3", "trl==1.4"]


def test_lower_bounds_are_read_and_must_agree():
    text = "".join(f'"{name}>={version}", "{name}>={version},<9"' for name, version in OLDEST.items())
    assert lower_bounds(text) == OLDEST
    with pytest.raises(ValueError, match=r"\['0.2', '0.9'\] for peft"):
        lower_bounds(text + '"peft>=0.9"')
    with pytest.raises(ValueError, match="for trl, expected one"):
        lower_bounds(text.replace("trl", "other"))


def test_a_record_is_read_back_and_a_new_line_takes_the_old_one_s_place(tmp_path):
    path = tmp_path / "compatibility.csv"
    other = dataclasses.replace(RESULT, torch="2.9.0", outcome="failed", failed=2)
    assert report.read(path) == []
    assert report.write(path, [], [RESULT, other]) == [other, RESULT]  # 2.9 before 2.11
    again = dataclasses.replace(RESULT, passed=6)
    assert report.write(path, report.read(path), [again]) == report.read(path) == [other, again]


def test_the_page_has_a_line_for_each_result_and_says_why_nothing_ran():
    refused = dataclasses.replace(RESULT, outcome="no matching distribution")
    lines = report.page([RESULT, refused]).splitlines()[-2:]
    assert lines[0].split(" | ")[-4:] == ["5", "0", "1", "2 |"]
    assert "| no matching distribution |" in lines[1]

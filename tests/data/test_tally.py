"""What was skipped is counted once, whoever met it; the share of it ends a run."""

import json
from collections import Counter

import pytest

from acoustic.console import UserError
from acoustic.data.tally import MAX_LISTED, Tally, reason_kind, refuse_too_many


def test_a_recording_is_one_fault_an_epoch_and_listed_once():
    tally = Tally()
    for epoch in range(3):
        tally.add([("a.wav", "silent (at 3 s)", True, epoch), ("a.wav", "silent (at 9 s)", True, epoch)], rows=10)
        tally.add([("a.wav", "silent (at 12 s)", True, epoch), ("b.wav", "0.1 s is shorter than x=1", False, epoch)])
    assert (tally.rows, tally.faults) == (30, 3)
    assert tally.report() == {
        "skipped": 2,
        "skipped_by_reason": {"silent": 1, "shorter than x=1": 1},
        "skipped_recordings": {"a.wav": "silent (at 3 s)", "b.wav": "0.1 s is shorter than x=1"},
    }


def test_the_list_is_bounded_and_the_count_is_not():
    tally = Tally()
    tally.add([(f"{n}.wav", "empty file", True, 0) for n in range(MAX_LISTED + 50)], rows=5_000)
    report = tally.report()
    assert report["skipped"] == MAX_LISTED + 50 == report["skipped_by_reason"]["empty file"]
    assert len(report["skipped_recordings"]) == MAX_LISTED


def test_two_processes_that_met_the_same_recording_count_it_once():
    first, second = Tally(), Tally()
    first.add([("a.wav", "empty file", True, 0), ("b.wav", "silent", True, 0)], rows=3)
    second.add([("b.wav", "silent", True, 0), ("c\udcff.wav", "silent", True, 0)], rows=4)
    first.merge(second)
    assert first.report()["skipped_by_reason"] == {"empty file": 1, "silent": 2}
    assert (first.rows, first.faults) == (7, 4)


def test_it_survives_a_checkpoint():
    tally = Tally()
    tally.add([("a.wav", "empty file", True, 0), ("c\udcff.wav", "silent", True, 0)], rows=3)
    restored = Tally()
    restored.load_state_dict(json.loads(json.dumps(tally.state_dict())))
    restored.add([("a.wav", "empty file", True, 1)], rows=1)
    assert restored.report() == tally.report() and (restored.rows, restored.faults) == (4, 3)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("0.32 s is shorter than min_duration_in_seconds=1", "shorter than min_duration_in_seconds=1"),
        ("truncated: 12 of 500 frames could be read", "truncated: # of # frames could be read"),
        (
            "not reachable: 503 Service Unavailable, after 5 attempts",
            "not reachable: 503 Service Unavailable, after # attempts",
        ),
        ("s3:// needs a package: pip install s3fs", "s3:// needs a package: pip install s3fs"),
        ("silent (at 12 s)", "silent"),
    ],
)
def test_alike_reasons_are_one_kind(reason, kind):
    assert reason_kind(reason) == kind


def test_too_many_end_the_run_with_what_dominates():
    reasons = Counter({"silent": 8, "empty file": 3})
    refuse_too_many(11, 110, reasons, 0.1, "x")
    with pytest.raises(UserError, match="12 of 110 rows of 'x'.*11% and more than 10%: 8 x silent, 3 x empty file"):
        refuse_too_many(12, 110, reasons, 0.1, "x")

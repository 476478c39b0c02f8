"""What is derived before a run: so much of the held-out audio as was asked for, a part of every recording."""

import pytest

from acoustic.console import UserError
from acoustic.data.headers import read_header
from acoustic.data.sources import open_rows
from acoustic.data.windows import cover
from acoustic.training.setup import limit_seconds

PLAN = cover(0.1, 0.5)


def windows(rows, plan) -> list[tuple[str, float]]:
    found = []
    for _, row in rows.iterate(0, 1, None, 0):
        found += [(row["name"], window.seconds) for window in plan(row, read_header(row["audio"]), None)]
    return found


def test_an_evaluation_is_as_long_as_asked_for_and_hears_every_recording(audio_folder):
    rows = open_rows(str(audio_folder(5, seconds=20.0)))
    plan = limit_seconds([(rows, 1.0)], PLAN, 30.0)
    heard = windows(rows, plan)
    assert sum(seconds for _, seconds in heard) == pytest.approx(30, abs=0.5)
    assert len({name for name, _ in heard}) == 5
    assert heard == windows(rows, limit_seconds([(rows, 1.0)], PLAN, 30.0))


@pytest.mark.parametrize("seconds", [0.01, 1e6])
def test_at_least_a_window_and_at_most_all(audio_folder, seconds):
    rows = open_rows(str(audio_folder(3, seconds=2.0)))
    heard = windows(rows, limit_seconds([(rows, 1.0)], PLAN, seconds))
    assert len(heard) == (1 if seconds < 1 else len(windows(rows, PLAN)))


def test_nothing_to_evaluate_is_said(audio_folder):
    rows = open_rows(str(audio_folder(2, seconds=0.05)))
    with pytest.raises(UserError, match="eval_split_name: nothing in .* can be used to evaluate"):
        limit_seconds([(rows, 1.0)], PLAN, 10.0)

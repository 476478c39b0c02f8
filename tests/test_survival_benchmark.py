"""The plumbing of benchmarks/survival.py: what it takes for a kill during a save, for the same run, for an update."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.survival import UPDATES, Run, leftovers, log_of, table, variants, where_killed


@pytest.mark.parametrize(
    "folders, where",
    [
        ([], "before any checkpoint"),
        (["_incomplete-checkpoint-5"], "during a save"),
        (["checkpoint-5", "checkpoint-10"], "between saves"),
        (["checkpoint-5", "checkpoint-10", "_incomplete-checkpoint-15"], "during a save"),
        (["checkpoint-10", "checkpoint-15", "_incomplete-checkpoint-5"], "during a deletion"),
        ([f"checkpoint-{UPDATES}"], "before the report"),
    ],
)
def test_where_a_run_was_killed_is_read_off_its_folder(tmp_path, folders, where):
    for name in folders:
        (tmp_path / name).mkdir()
    assert where_killed(tmp_path, set()) == where
    if where in ("during a save", "during a deletion"):
        assert where_killed(tmp_path, leftovers(tmp_path)) != where, "it is of the kill before"


def test_a_log_is_compared_to_the_last_bit_but_for_the_clock(tmp_path):
    def log(**entry):
        history = {"log_history": [{"loss": 0.1, "step": 1, **entry}, {"eval_loss": 1.0}]}
        (tmp_path / "trainer_state.json").write_text(json.dumps(history))
        return log_of(tmp_path)

    assert log(data_wait_fraction=0.1) == log(data_wait_fraction=0.2)
    assert log(loss=0.1 + 0.2) != log(loss=0.3)


@pytest.mark.parametrize(
    "begun, logs, update", [(0, [], 0), (0, [1], 1), (0, [1, 3, 1500], 1500), (10, [], 10), (10, [12], 12)]
)
def test_the_last_update_is_that_of_the_last_line(begun, logs, update):
    lines = [f"resuming from out/checkpoint-{begun}"] * (begun > 0)
    lines += [f"update {logged:,} of 2,000 | loss 1.0" for logged in logs]
    run = Run([sys.executable, "-c", f"print({chr(10).join(lines)!r})"])
    assert run.end() == 0
    assert run.logged_update == update


def test_thirty_kills_of_which_eight_and_more_aim_at_a_save():
    moments = [moment for variant in variants(0, quick=False) for life in variant.lives for moment in life]
    assert len(moments) == 30
    assert sum(moment.when == "save" for moment in moments) >= 8


def test_a_table_has_the_columns_of_all_rows():
    lines = table([{"run": "one", "kills": 3}, {"run": "two", "exact": True, "s": 1234.5}]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["run", "kills", "exact", "s"]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["two", "", "yes", "1,234"]


def test_the_tables_in_the_readme_are_those_that_were_measured():
    folder = Path(__file__).parents[1] / "benchmarks"
    readme = (folder / "README.md").read_text()
    for part, measured in json.loads((folder / "results/survival.json").read_text()).items():
        for line in table(measured["rows"]).splitlines()[2:]:
            assert re.sub(" +", " ", line) in readme, f"{part}: {line}"

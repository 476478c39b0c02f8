"""Real processes, killed at a random moment and while they write a checkpoint, go on as if nothing had been.

The short form of `python benchmarks/survival.py`.
"""

import dataclasses
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.survival import ONE, PROCESSES, Bench, Moment, live

# To be short: 30 updates, and the run that nothing happens to beside the one that is killed.
UPDATES = 30


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("survival") / "work")


@pytest.mark.parametrize(
    "variant, file", [(ONE, None), (PROCESSES, "model.safetensors")], ids=["one process", "two processes"]
)
def test_a_killed_run_goes_on_to_the_same_end(bench, variant, file):
    short = dataclasses.replace(variant, options={**variant.options, "max_steps": UPDATES})
    moments = (Moment("training", random.uniform(0, 0.3)), Moment("save", file=file))
    with ThreadPoolExecutor() as pool:
        pool.submit(bench.reference, short)
        life = pool.submit(live, bench, short, moments).result()
    assert life.exact and life.problems == []
    assert len(life.kills) == 2 and "during a save" in life.kills
    assert max(life.again) <= 5

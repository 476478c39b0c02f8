"""Targets from a seed, the temperature's decay, sums that become means."""

import pytest
import torch

from acoustic.config import PretrainingArguments
from acoustic.training.pretraining import PretrainingStep


@pytest.fixture
def step(model, tmp_path):
    def make(**settings):
        return PretrainingStep(model, PretrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings))

    return make


def with_targets(step, seed) -> dict:
    batch = {"input_values": torch.zeros(3, 16000)}
    step.add_targets(batch, seed)
    return batch


def test_targets_follow_the_seed_alone(step):
    assert with_targets(step(), (1, 5, 0, 2))["seed"] == with_targets(step(), (1, 5, 0, 2))["seed"]


@pytest.mark.parametrize("other", [(2, 5, 0, 2), (1, 6, 0, 2), (1, 5, 1, 2), (1, 5, 0, 3)])
def test_every_update_process_and_micro_batch_has_its_own_targets(step, other):
    first, second = (with_targets(step(), seed)["seed"] for seed in ((1, 5, 0, 2), other))
    model = step().model
    assert not torch.equal(*(model.draw_targets(3, 16000, seed).mask for seed in (first, second)))


def test_all_processes_leave_out_the_same_layers(step, model):
    """Another choice in each update and micro-batch; the same on every process, or all would wait for the slowest."""
    assert "kept_layers" not in with_targets(step(), (1, 5, 0, 2))
    model.config.layerdrop = 0.5
    kept = {
        (update, rank, index): with_targets(step(), (1, update, rank, index))["kept_layers"]
        for update in range(8)
        for rank in range(2)
        for index in range(2)
    }
    assert all(kept[update, 0, index] == kept[update, 1, index] for update in range(8) for index in range(2))
    assert len(set(kept.values())) == 4
    assert any(kept[update, 0, 0] != kept[update, 0, 1] for update in range(8))


def test_targets_are_counted_without_drawing_them(step, model):
    batch = with_targets(step(), (1, 5, 0, 2))
    assert step().count_targets(batch) == int(model.draw_targets(3, 16000, batch["seed"]).mask.sum())


def test_temperature_decays_to_its_floor(step):
    temperature = step(
        gumbel_temperature_start=2.0, gumbel_temperature_floor=0.3, gumbel_temperature_decay=0.5
    ).temperature
    assert [temperature(update) for update in range(5)] == [2.0, 1.0, 0.5, 0.3, 0.3]


def test_the_papers_temperature(step):
    temperature = step().temperature
    assert temperature(0) == 2.0
    assert temperature(100_000) == pytest.approx(2 * 0.999995**100_000)
    assert temperature(400_000) == 0.5


def test_means_are_per_masked_frame(step):
    totals = dict.fromkeys(step().sum_names, 30.0) | {"targets": 10.0, "frames": 40.0}
    means = step().means(totals)
    assert means.pop("masked_fraction") == 0.25
    assert set(means.values()) == {3.0}

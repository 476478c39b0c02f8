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


def batch_with_targets(step, seed, **batch):
    batch = {"input_values": torch.zeros(3, 16000), **batch}
    step.add_targets(batch, seed)
    return batch


def test_targets_follow_the_seed_alone(step):
    first, again = (batch_with_targets(step(), (1, 5, 0, 2)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("other", [(2, 5, 0, 2), (1, 6, 0, 2), (1, 5, 1, 2), (1, 5, 0, 3)])
def test_every_update_process_and_micro_batch_has_its_own_targets(step, other):
    masks = [batch_with_targets(step(), seed)["mask_time_indices"] for seed in ((1, 5, 0, 2), other)]
    assert not torch.equal(*masks)


def test_mask_settings_arrive(step):
    few, many = (batch_with_targets(step(mask_time_prob=prob), (0,)) for prob in (0.2, 0.8))
    assert step().count_targets(few) < step().count_targets(many)
    single = batch_with_targets(step(mask_time_prob=0.1, mask_time_length=1), (0,))
    assert step().count_targets(single) <= 3 * 6  # 49 frames: at most 5 + 1 a row


def test_negatives_from_arrives(step):
    batch = batch_with_targets(step(negatives_from="batch"), (0,))
    frames = batch["mask_time_indices"].shape[1]
    rows = batch["sampled_negative_indices"][0][batch["mask_time_indices"][0]] // frames
    assert rows.unique().tolist() == [0, 1, 2]


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
    totals = dict.fromkeys(PretrainingStep(None, None).sum_names, 30.0) | {"targets": 10.0, "frames": 40.0}
    means = step().means(totals)
    assert means.pop("masked_fraction") == 0.25
    assert set(means.values()) == {3.0}

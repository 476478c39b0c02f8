"""One division of the loss, one temperature per update, evaluations that compare, and what is logged."""

import copy

import pytest
import torch
from stock import draw

import run_pretrain
from acoustic.report.record import read_json
from acoustic.training.pretraining import PretrainingStep

# design.md, "Logged in pretraining".
LOGGED = """
    loss contrastive_loss diversity_loss accuracy code_perplexity lowest_group_perplexity prob_perplexity
    gumbel_temperature masked_fraction grad_norm learning_rate audio_seconds_per_second hours_seen data_wait_fraction
"""


def make_batches(model) -> list[dict]:
    """Four batches of two windows, whose numbers of masked frames are far apart."""
    generator, batches = torch.Generator().manual_seed(0), []
    frames = int(model._get_feat_extract_output_lengths(16000))
    for prob in (0.1, 0.3, 0.6, 0.9):
        audio = torch.randn(2, 16000, generator=generator)
        batches.append({"input_values": audio, **draw(2, frames, prob, generator)})
    return batches


def join(batches: list[dict]) -> dict:
    """One batch of all windows; the negatives' numbers move with their rows."""
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    rows = torch.arange(len(joined["input_values"]) // 2).repeat_interleave(2)
    shift = rows * 2 * joined["mask_time_indices"].shape[1]
    negatives = joined["sampled_negative_indices"] + shift[:, None, None]
    joined["sampled_negative_indices"] = negatives * joined["mask_time_indices"][..., None]
    return joined


def without_diversity(model):
    """The diversity loss is a perplexity of the micro-batch's mean, so it is the one term that depends on the cut."""
    model = copy.deepcopy(model)
    model.config.diversity_loss_weight = 0.0
    return model


def changes(before, after) -> dict[str, torch.Tensor]:
    old = before.state_dict()
    return {name: value - old[name] for name, value in after.state_dict().items()}


def distance(first: dict, second: dict) -> float:
    """Of two updates, relative to the first."""
    difference = sum((first[name] - second[name]).square().sum() for name in first)
    return float((difference / sum(value.square().sum() for value in first.values())).sqrt())


def test_one_batch_of_eight_equals_four_of_two(model, make_trainer, training_log, noiseless):
    batches, updates, logs = make_batches(model), {}, {}
    counts = [int(batch["mask_time_indices"].sum()) for batch in batches]
    assert max(counts) > 3 * min(counts)
    for name, given in {"1x8": [join(batches)], "4x2": batches}.items():
        trained = without_diversity(model)
        trainer = make_trainer(trained, given, gradient_accumulation_steps=len(given))
        trainer.train()
        updates[name], logs[name] = changes(model, trained), training_log(trainer.state.log_history)[0]
    assert distance(updates["1x8"], updates["4x2"]) < 1e-4
    for key in ("loss", "contrastive_loss", "accuracy", "masked_fraction", "grad_norm"):
        assert logs["1x8"][key] == pytest.approx(logs["4x2"][key], rel=1e-4), key

    # What the peers do: the mean of each micro-batch's mean.
    peers = without_diversity(model).train()
    for batch in batches:
        output = peers(**batch)
        (output.loss / output.num_targets / len(batches)).backward()
    peers_update = {
        name: -0.1 * parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in peers.named_parameters()
    }
    assert distance({name: updates["1x8"][name] for name in peers_update}, peers_update) > 0.05


def test_logged_losses_are_nats_per_masked_frame(model, make_trainer, training_log, noiseless):
    batches = make_batches(model)[:2]
    model.train()
    with torch.no_grad():
        outputs = [model(**batch) for batch in batches]
    frames = sum(float(output.num_targets) for output in outputs)
    trainer = make_trainer(model, batches, gradient_accumulation_steps=2)
    trainer.train()
    entry = training_log(trainer.state.log_history)[0]
    for key in ("loss", "contrastive_loss", "diversity_loss"):
        assert entry[key] == pytest.approx(sum(float(output[key]) for output in outputs) / frames, rel=1e-5), key
    assert entry["accuracy"] == pytest.approx(sum(int(output.metrics["accuracy"]) for output in outputs) / frames)
    masked = torch.cat([batch["mask_time_indices"] for batch in batches]).float().mean()
    assert entry["masked_fraction"] == pytest.approx(float(masked))


def test_a_log_entry_is_the_mean_since_the_last(model, make_trainer, training_log, noiseless):
    """Over the masked frames of two updates, not over two means."""
    batches = [make_batches(model)[index] for index in (0, 3)]
    entries = {}
    for steps in (1, 2):
        trainer = make_trainer(
            copy.deepcopy(model),
            batches,
            logging_steps=steps,
            logging_first_step=False,
            max_steps=2,
            learning_rate=0.0,
        )
        trainer.train()
        entries[steps] = training_log(trainer.state.log_history)
    counts = [int(batch["mask_time_indices"].sum()) for batch in batches]
    expected = sum(count * entry["loss"] for count, entry in zip(counts, entries[1])) / sum(counts)
    assert len(entries[2]) == 1
    assert entries[2][0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_temperature_is_annealed_per_update(model, make_trainer, training_log):
    seen = []
    trainer = make_trainer(
        model,
        make_batches(model),
        gradient_accumulation_steps=4,
        max_steps=3,
        gumbel_temperature_start=2.0,
        gumbel_temperature_decay=0.5,
        gumbel_temperature_floor=0.1,
    )
    forward = trainer.step.forward
    trainer.step.forward = lambda model_, batch: (
        seen.append(float(trainer.model.quantizer.temperature)),
        forward(model_, batch),
    )[1]
    trainer.train()
    assert seen == [2.0] * 4 + [1.0] * 4 + [0.5] * 4
    assert [entry["gumbel_temperature"] for entry in training_log(trainer.state.log_history)] == [2.0, 1.0, 0.5]


def test_two_evaluations_give_the_same_numbers(model, make_trainer):
    """Dropout and Gumbel noise are off and the masks are the same, whatever came between."""
    audio = [{"input_values": torch.randn(2, 16000)} for _ in range(2)]
    trainer = make_trainer(model, audio, PretrainingStep, eval_batches=audio, learning_rate=0.0, max_steps=2)
    first = trainer.evaluate()
    trainer.train()
    second = trainer.evaluate()
    measured = [key for key in first if key not in ("eval_runtime", "epoch")]
    assert {"eval_contrastive_loss", "eval_accuracy", "eval_code_perplexity"} <= set(measured)
    assert [first[key] for key in measured] == [second[key] for key in measured]


def test_evaluation_leaves_training_mode_as_it_was(model, make_trainer):
    batches = make_batches(model)
    trainer = make_trainer(model, batches, eval_batches=batches)
    for training in (True, False):
        model.train(training)
        trainer.evaluate()
        assert model.training is training


def test_an_evaluation_without_any_target_says_so(model, make_trainer, capsys):
    """Nothing measured is not a loss of 0."""
    trainer = make_trainer(model, make_batches(model), eval_batches=[])
    assert trainer.evaluate() == {}
    assert "nothing to evaluate" in capsys.readouterr().out


@pytest.mark.parametrize("penalty", [0, 10])
def test_the_logged_names_are_the_documented_ones(pretrain_args, training_log, tmp_path, penalty):
    run_pretrain.main(pretrain_args(max_steps=2, eval_steps=2, feature_penalty_weight=penalty))
    history = read_json(tmp_path / "out" / "trainer_state.json")["log_history"]
    entries = training_log(history)
    assert len(entries) == 2
    for entry in entries:
        assert set(entry) - {"step", "epoch"} == {*LOGGED.split(), *(["feature_penalty"] if penalty else [])}
    evaluation = next(entry for entry in history if "eval_loss" in entry)
    assert {"eval_contrastive_loss", "eval_accuracy", "eval_code_perplexity"} <= set(evaluation)
    assert entries[1]["hours_seen"] > entries[0]["hours_seen"] > 0


def run_losses(pretrain_args, training_log, folder, **options) -> list[float]:
    run_pretrain.main(pretrain_args(max_steps=3, eval_strategy="no", output_dir=folder, **options))
    return [entry["loss"] for entry in training_log(read_json(folder / "trainer_state.json")["log_history"])]


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"recompute_convs": True}])
def test_what_saves_memory_changes_no_number(pretrain_args, training_log, tmp_path, audio_folder, options):
    """Dropout included: what is computed again draws the same."""
    given = {"dataset_name": audio_folder(8, seconds=[1.1 + 0.2 * index for index in range(8)])}
    plain = run_losses(pretrain_args, training_log, tmp_path / "plain", **given)
    saving = run_losses(pretrain_args, training_log, tmp_path / "saving", **given, **options)
    assert saving == pytest.approx(plain, rel=1e-5)


def test_bfloat16_trains_near_float32(pretrain_args, training_log, tmp_path, audio_folder):
    given = {"dataset_name": audio_folder(8, seconds=[1.1 + 0.2 * index for index in range(8)])}
    exact = run_losses(pretrain_args, training_log, tmp_path / "exact", **given)
    half = run_losses(pretrain_args, training_log, tmp_path / "half", **given, bf16=True)
    assert half != exact
    assert half == pytest.approx(exact, rel=0.05)

"""What is trained when: the head alone first, then the encoder, the conv encoder never; and the few-label defaults."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback, Wav2Vec2ForSequenceClassification

from acoustic.config import FinetuningArguments
from acoustic.data.survey import Survey
from acoustic.tasks.classification import Classification
from acoustic.training.finetuning import FinetuningStep, choose_freeze_steps

HOUR = 3600.0


class Snapshots(TrainerCallback):
    """All weights before the first update and after each."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})

    on_step_end = on_train_begin

    def changed(self, prefix: str) -> list[bool]:
        """For every update, whether a weight under `prefix` changed."""
        pairs = zip(self.weights, self.weights[1:])
        return [
            any(not torch.equal(old[name], new[name]) for name in new if name.startswith(prefix)) for old, new in pairs
        ]


@pytest.fixture
def task():
    rows = SimpleNamespace(columns=lambda column: ["a", "b", "b"], description="three clips")
    return Classification(rows, None)


@pytest.fixture
def arguments(tmp_path):
    def make(**settings):
        return FinetuningArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)

    return make


@pytest.fixture
def fine_tune(group_norm_checkpoint, task, make_trainer):
    """run(freeze_encoder_steps, max_steps) -> (trainer, snapshots)."""

    def run(freeze_encoder_steps: int, max_steps: int = 4):
        torch.manual_seed(0)
        model = Wav2Vec2ForSequenceClassification.from_pretrained(group_norm_checkpoint, num_labels=2)
        model.freeze_feature_encoder()
        batch = {"input_values": torch.randn(2, 8000), "labels": torch.tensor([0, 1]), "names": ["x", "y"]}
        trainer = make_trainer(
            model,
            [batch],
            step=lambda model, args: FinetuningStep(model, task, freeze_encoder_steps),
            args_class=FinetuningArguments,
            max_steps=max_steps,
            lr_scheduler_type="tri_stage",
        )
        snapshots = Snapshots()
        trainer.add_callback(snapshots)
        trainer.train()
        return trainer, snapshots

    return run


def test_the_encoder_is_frozen_for_the_first_updates_only(fine_tune, training_log):
    trainer, snapshots = fine_tune(freeze_encoder_steps=2)
    assert snapshots.changed("wav2vec2.encoder.") == [False, False, True, True]
    assert snapshots.changed("wav2vec2.feature_projection.") == [False, False, True, True]
    assert snapshots.changed("wav2vec2.feature_extractor.") == [False] * 4
    assert snapshots.changed("classifier.") == [True] * 4
    assert not any(weight.requires_grad for weight in trainer.model.wav2vec2.feature_extractor.parameters())
    assert [entry["encoder_frozen"] for entry in training_log(trainer.state.log_history)] == [1, 1, 0, 0]


def test_without_freezing_the_encoder_is_trained_from_the_start(fine_tune):
    _, snapshots = fine_tune(freeze_encoder_steps=0)
    assert snapshots.changed("wav2vec2.encoder.") == [True] * 4
    assert snapshots.changed("wav2vec2.feature_extractor.") == [False] * 4


def test_the_schedule_is_tri_stage(fine_tune, training_log):
    trainer, _ = fine_tune(freeze_encoder_steps=0, max_steps=10)
    rates = [entry["learning_rate"] / 0.1 for entry in training_log(trainer.state.log_history)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[1:6] == pytest.approx([1.0] * 5)
    assert rates[-1] == pytest.approx(0.05 ** (4 / 5))


def surveyed(hours: float) -> Survey:
    return Survey(recordings=1, windows=1, seconds=hours * HOUR)


@pytest.mark.parametrize(
    ("hours", "steps"), [(1 / 6, 1000), (1, 1000), (3, 1000), (3.1, 650), (10, 650), (30, 650), (31, 0), (100, 0)]
)
def test_few_label_defaults_are_the_published_shares(arguments, hours, steps, capsys):
    """10k of 13k updates for 10 min and 1 h, 10k of 20k for 10 h, none of 80k for 100 h."""
    assert choose_freeze_steps(arguments(max_steps=1300), surveyed(hours)) == steps
    assert (f"encoder frozen for {steps} of 1300 updates" in capsys.readouterr().out) is bool(steps)


def test_what_is_given_wins(arguments):
    assert choose_freeze_steps(arguments(max_steps=1300, freeze_encoder_steps=7), surveyed(1)) == 7
    assert choose_freeze_steps(arguments(max_steps=1300, freeze_encoder_steps=0), surveyed(1)) == 0


def test_random_weights_are_frozen_only_when_told_so(arguments):
    assert choose_freeze_steps(arguments(max_steps=1300, random_weights=True), surveyed(1)) == 0
    given = arguments(max_steps=1300, freeze_encoder_steps=7, random_weights=True)
    assert choose_freeze_steps(given, surveyed(1)) == 7


def test_a_stream_of_unknown_length_is_not_frozen(arguments):
    assert choose_freeze_steps(arguments(max_steps=1300), None) == 0

"""A trainer on batches that a test made, and a run of the whole script on a folder of tones."""

import itertools
import json

import pytest
import torch
from torch.utils.data import IterableDataset

from acoustic.config import PretrainingArguments
from acoustic.models.wav2vec2 import Wav2Vec2ForPreTraining
from acoustic.training.pretraining import PretrainingStep
from acoustic.training.trainer import AcousticTrainer

# Plain gradient descent without noise: the change of a weight is its gradient.
NO_NOISE = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
    "layerdrop": 0.0,
}
SGD = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
}


class Batches(IterableDataset):
    """Given batches as a `BatchStream` would give them: over and over in training, else once."""

    rate = 16_000
    description = "given batches"

    def __init__(self, batches: list[dict], train: bool = True):
        self.batches, self.train = batches, train

    def __iter__(self):
        for epoch in itertools.count() if self.train else [0]:
            for number, batch in enumerate(self.batches, 1):
                seconds = batch["input_values"].numel() / self.rate
                about = {"audio_seconds": seconds, "epoch": epoch + number / len(self.batches), "state": {}}
                yield {**batch, **about, "skipped": [], "rows": 0}


class GivenTargets(PretrainingStep):
    """Masks and negatives are part of the batch."""

    def add_targets(self, batch: dict, seed: tuple) -> None:
        assert "sampled_negative_indices" in batch

    def count_targets(self, batch: dict) -> int:
        return int(batch["mask_time_indices"].sum())


@pytest.fixture
def model(group_norm_checkpoint):
    return Wav2Vec2ForPreTraining.from_pretrained(group_norm_checkpoint, **NO_NOISE)


@pytest.fixture
def make_trainer(tmp_path):
    """make(model, batches, step, eval_batches, args_class, **arguments) -> AcousticTrainer; one update unless told."""

    def make(
        model, batches, step=GivenTargets, eval_batches=None, args_class=PretrainingArguments, **changed
    ) -> AcousticTrainer:
        settings = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_num_workers": 0,
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 1,
            **SGD,
            **changed,
        }
        args = args_class(**settings)
        return AcousticTrainer(
            model=model,
            args=args,
            step=step(model, args),
            train_dataset=Batches(batches),
            eval_dataset=None if eval_batches is None else Batches(eval_batches, train=False),
        )

    return make


@pytest.fixture
def noiseless(monkeypatch):
    """The quantizer's Gumbel noise is 0: -log(1)."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.fill_(1.0))


@pytest.fixture
def pretrain_args(audio_folder, tiny_config, tmp_path):
    """args(**options) -> the argv of a short run on a folder of tones; options with None are left out."""

    def args(**changed) -> list[str]:
        options = {
            "dataset_name": changed.pop("dataset_name", None)
            or audio_folder(8, seconds=[1.1 + 0.2 * i for i in range(8)]),
            "output_dir": tmp_path / "out",
            "config_overrides": json.dumps(tiny_config),
            "min_duration_in_seconds": 0.5,
            "max_duration_in_seconds": 1.5,
            "batch_seconds": 4,
            "max_steps": 4,
            "logging_steps": 1,
            "dataloader_num_workers": 0,
            "validation_split_percentage": 20,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **changed,
        }
        return [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]

    return args


@pytest.fixture
def training_log():
    """log_history -> its entries of training, one for each logged update."""
    return lambda history: [entry for entry in history if "loss" in entry]

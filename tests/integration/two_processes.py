"""Runs that one or more processes do in the same way; each process writes what it saw to FOLDER/{run}_{rank}.pt.

torchrun --nproc_per_node 2 tests/integration/two_processes.py FOLDER
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from blank_figures import render

import run_finetune
import run_pretrain
from acoustic import report
from acoustic.config import PretrainingArguments
from acoustic.console import RunError, one_line_errors
from acoustic.data.batches import BatchStream
from acoustic.models.wav2vec2 import Wav2Vec2ForPreTraining
from acoustic.training.health import HealthWatch, Verdict
from acoustic.training.pretraining import PretrainingStep
from acoustic.training.trainer import AcousticTrainer

RANK = int(os.environ.get("RANK", "0"))


class Digests(TrainerCallback):
    """A digest of each part of the weights, before the first update and after each."""

    def __init__(self):
        self.updates: list[dict[str, str]] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        parts = {}
        for name, value in model.state_dict().items():
            part = ".".join(name.removeprefix("module.").split(".")[:2])
            parts.setdefault(part, hashlib.sha256()).update(value.numpy().tobytes())
        self.updates.append({part: digest.hexdigest() for part, digest in parts.items()})

    on_step_end = on_train_begin


def spied(script, argv: list[str]) -> dict:
    """Run a script; what this process decoded and how its weights moved."""
    windows, digests = {"train": [], "evaluation": []}, Digests()
    make, train = BatchStream.make, AcousticTrainer.train

    def spied_make(stream, batch, *args):
        seen = windows["train" if stream.train else "evaluation"]
        seen += [(window.row["name"], window.start) for window in batch]
        return make(stream, batch, *args)

    def spied_train(trainer, **kwargs):
        trainer.add_callback(digests)
        train(trainer, **kwargs)
        digests.history = trainer.state.log_history

    with mock.patch.object(BatchStream, "make", spied_make), mock.patch.object(AcousticTrainer, "train", spied_train):
        results = script.main(argv)
    return {"windows": windows, "updates": digests.updates, "history": digests.history, "results": results}


def short_of_memory(argv: list[str]) -> dict:
    """The second process has no room for its first batch of the third update and for its second batch of the fourth;
    for the second batch of an update the other process waits.
    """
    calls, compute = itertools.count(), AcousticTrainer.compute_loss

    def sometimes(trainer, *args, **kwargs):
        if RANK == 1 and next(calls) in (4, 7):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(trainer, *args, **kwargs)

    with mock.patch.object(AcousticTrainer, "compute_loss", sometimes):
        return spied(run_pretrain, argv)


def stopped_by_itself(argv: list[str]) -> dict:
    """The watch sees a collapse; the first process takes its time over the report."""

    def collapsed(watch, entry):
        return [Verdict("collapse", 1, 2, "a collapse", collapse=True)] if entry["step"] == 2 else []

    def slowly(*args, **kwargs):
        time.sleep(3)
        write_card(*args, **kwargs)

    write_card = report.write_card
    with mock.patch.object(HealthWatch, "see", collapsed), mock.patch.object(report, "write_card", slowly):
        try:
            run_pretrain.main(argv)
        except RunError as error:
            return {"error": str(error), "at": time.time()}


def mistaken(argv: list[str]) -> dict:
    """What this process says of a user's mistake, and its exit code."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            with one_line_errors():
                run_pretrain.main(argv)
        except SystemExit as end:
            return {"said": said.getvalue(), "code": end.code}


class Given(IterableDataset):
    """Batches with their targets, over and over."""

    rate, description = 16_000, "given batches"

    def __init__(self, batches: list[dict]):
        self.batches = batches

    def __iter__(self):
        for batch in itertools.cycle(self.batches):
            yield {**batch, "audio_seconds": 1.0, "skipped": [], "rows": 1, "epoch": 0.0, "state": {}}


def train_on(batches: list[dict], checkpoint: str, output_dir: str) -> dict:
    """An update by plain gradient descent on each batch, without dropout or Gumbel noise."""
    names = ("hidden", "attention", "activation", "feat_proj", "feat_quantizer")
    model = Wav2Vec2ForPreTraining.from_pretrained(checkpoint, **{f"{name}_dropout": 0.0 for name in names})
    # A perplexity of the micro-batch's mean: the one term that depends on how the windows are dealt out.
    model.config.diversity_loss_weight = 0.0
    args = PretrainingArguments(
        output_dir=output_dir,
        max_steps=len(batches),
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        dataloader_num_workers=0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    step = PretrainingStep(model, args)
    step.add_targets = lambda batch, seed: None
    step.count_targets = lambda batch: int(batch["mask_time_indices"].sum())
    trainer = AcousticTrainer(model=model, args=args, step=step, train_dataset=Given(batches))
    with mock.patch.object(torch.Tensor, "exponential_", lambda tensor: tensor.fill_(1.0)):
        trainer.train()
    return {"weights": model.state_dict(), "history": trainer.state.log_history}


def main(folder: Path) -> None:
    argv = json.loads((folder / "argv.json").read_text())
    given = torch.load(folder / "batches.pt")
    runs = {
        "given": lambda: train_on(given["batches"][RANK], given["checkpoint"], str(folder / "given")),
        "pretrain": lambda: spied(run_pretrain, argv["pretrain"]),
        "resumed": lambda: spied(run_pretrain, argv["resumed"]),
        "short_of_memory": lambda: short_of_memory(argv["short_of_memory"]),
        "stopped": lambda: stopped_by_itself(argv["stopped"]),
        "compiled": lambda: spied(run_pretrain, argv["compiled"]),
        "finetune": lambda: spied(run_finetune, argv["finetune"]),
        "mistaken": lambda: mistaken(argv["mistaken"]),
    }
    for name, run in runs.items():
        torch.save(run(), folder / f"{name}_{RANK}.pt")


if __name__ == "__main__":
    render(figures=False)
    main(Path(sys.argv[1]))

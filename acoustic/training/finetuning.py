"""What is computed on a fine-tuning batch: the task's loss and predictions, and the encoder's freezing by updates."""

import math

import torch

from acoustic.console import say
from acoustic.data.survey import Survey
from acoustic.tasks.defaults import few_label_settings


class FinetuningStep:
    """
    Args:
        task: one of `acoustic.tasks`; says what a target is and what the outputs mean.
        freeze_encoder_steps: updates in which only the head is trained.
    """

    sum_names = ("loss", "targets", "clips", "empty")

    def __init__(self, model, task, freeze_encoder_steps: int):
        self.task, self.freeze_encoder_steps = task, freeze_encoder_steps
        # Decided now, so that what is frozen for good (the conv encoder) stays so when the rest is released.
        self.encoder = [p for p in model.base_model.parameters() if p.requires_grad]
        self.frozen, self.updates = False, 0
        self.empty_fraction, self.next_remark = None, 1

    def make_watch(self, update_seconds: float) -> None:
        """None: a few hundred updates on few labels have no collapse to watch for."""

    def add_targets(self, batch: dict, seed: tuple[int, ...]) -> None:
        """Labels are part of the batch."""

    def count_targets(self, batch: dict) -> int:
        return self.task.count_targets(batch["labels"])

    def before_forward(self, model, update: int) -> None:
        self.updates = update + 1
        frozen = update < self.freeze_encoder_steps
        if frozen != self.frozen:
            for parameter in self.encoder:
                parameter.requires_grad_(not frozen)
            self.frozen = frozen

    def forward(self, model, batch: dict):
        return model(**{name: batch[name] for name in self.task.model_inputs if name in batch})

    def smallest(self, batch: dict) -> dict:
        """A part of a batch that takes little memory."""
        return {name: value[:1] for name, value in batch.items() if isinstance(value, torch.Tensor)}

    def sums(self, outputs, batch: dict) -> tuple[torch.Tensor, dict]:
        count = self.task.count_targets(batch["labels"])
        loss = self.task.summed_loss(outputs, batch["labels"], count)
        sums = {"loss": loss.detach(), "targets": count}
        empty = self.task.count_empty(outputs.logits.detach())
        if empty is not None:
            sums |= {"clips": len(batch["labels"]), "empty": empty}
        return loss, sums

    def means(self, totals: dict[str, float]) -> dict[str, float]:
        means = {"loss": totals["loss"] / (totals["targets"] or math.nan)}
        if totals["clips"]:
            means["empty_fraction"] = totals["empty"] / totals["clips"]
        self.empty_fraction = means.get("empty_fraction")
        return means

    def log_values(self, update: int) -> dict[str, float]:
        if self.empty_fraction is not None and update >= self.next_remark:
            # At updates 1, 2, 4, ... so that a long first phase doesn't fill the log.
            self.next_remark = 2 * update
            for line in self.task.remarks({"empty_fraction": self.empty_fraction}, update):
                say(line)
        return {"encoder_frozen": float(self.frozen)}

    def collect(self, outputs, batch: dict) -> list:
        return self.task.predictions(outputs.logits, batch)

    def metrics(self, collected: list) -> dict[str, float]:
        metrics = self.task.metrics(collected)
        for line in self.task.remarks(metrics, self.updates):
            say(line)
        return metrics


def choose_freeze_steps(args, survey: Survey | None) -> int:
    """Updates with a frozen encoder: as given, none for random weights, else the published share."""
    if args.freeze_encoder_steps is not None:
        return args.freeze_encoder_steps
    if args.random_weights:
        return 0
    share = few_label_settings(survey.seconds if survey else None).frozen_share
    steps = round(share * args.max_steps)
    if steps:
        labels = f"{survey.seconds / 60:.1f} min of labels"
        say(f"encoder frozen for {steps} of {args.max_steps} updates: {share:.0%}, as published for {labels}")
    return steps

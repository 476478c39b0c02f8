"""What a task is: labels, a head, a loss, scores. `run_finetune.py` calls its methods, from the first to the last."""

from collections.abc import Callable

import torch

from acoustic.data.rows import Rows
from acoustic.data.windows import Plan


class Task:
    """A subclass is made of the training rows, before any audio is opened: `__init__(rows, data_args)`.

    auto_class: transformers' Auto class of the model; its heads for our own systems are in acoustic/models/heads.py.
    best_metric, greater_is_better: which checkpoint is the best on the evaluation split.
    shown_metrics: those that the last line and the model card name.
    label_kind: which column of the data set is read: "label", "text" or "spans".
    model_inputs: what of a batch the model gets.
    last: what `metrics` was given last.
    """

    auto_class: type
    best_metric: str
    greater_is_better: bool
    shown_metrics: tuple[str, ...]
    label_kind: str
    model_inputs: tuple[str, ...]
    last: list

    # ---- before training

    def subset(self, rows: Rows, labels_per_class: int | None, seed: int) -> Rows:
        """A label budget."""
        return rows

    def build(self, model_args, random_weights: bool, labeled_seconds: float | None, weighted_layer_sum: bool = False):
        """(model, feature extractor, notes)."""
        raise NotImplementedError

    def unseen(self, splits: dict[str, Rows | None]) -> list[str]:
        """What is to be said of labels in other splits that training never saw."""
        return []

    def notes(self) -> list[str]:
        """What is to be said of the labels."""
        return []

    def plan(self, data_args, frames: Callable[[float], int], train: bool) -> Plan:
        """Which parts of a recording become windows; frames: seconds -> frames of the model."""
        raise NotImplementedError

    def encode(self, row: dict):
        """The label of a window as numbers."""
        raise NotImplementedError

    def processing_class(self, feature_extractor):
        """What is saved beside the model."""
        return feature_extractor

    # ---- a batch

    def count_targets(self, labels: torch.Tensor) -> int:
        """What an update's loss is divided by."""
        return len(labels)

    def summed_loss(self, outputs, labels: torch.Tensor, count: int) -> torch.Tensor:
        """Of a batch with so many targets; transformers' heads give the mean."""
        return outputs.loss * count

    def count_empty(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Clips for which the model says nothing at all; None where it always says something."""
        return None

    # ---- evaluation

    def predictions(self, logits: torch.Tensor, batch: dict) -> list[dict]:
        """One for each window."""
        raise NotImplementedError

    def metrics(self, collected: list[dict]) -> dict[str, float]:
        """Of the predictions for all windows of a split, each once, in any order."""
        raise NotImplementedError

    def remarks(self, metrics: dict[str, float], updates: int) -> list[str]:
        """What a user may take for a bug."""
        return []

    # ---- after training

    def settle(self, evaluate: Callable[[], dict] | None) -> list[str]:
        """What is chosen on the held-out part, which `evaluate` scores; returns what it says."""
        return []

    def readable(self, collected: list) -> list[dict]:
        """The predictions as they are written to a file, the worst first."""
        raise NotImplementedError

    def sections(self, split: str, collected: list) -> dict[str, list[str]]:
        """For the model card, of a split: title -> lines of Markdown."""
        return {}

    def figures(self, output_dir: str, split: str, collected: list, figures) -> list:
        """Paths of the pictures of a split; figures: the module acoustic.report.figures."""
        return []

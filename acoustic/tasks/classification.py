"""One label per recording: folder-per-class or a label column -> a classification head, accuracy and macro-F1."""

from collections import Counter

import datasets
import evaluate
import numpy as np
import torch
import transformers
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from acoustic.console import UserError
from acoustic.data.headers import Skip
from acoustic.data.rows import IndexedRows, Rows
from acoustic.data.windows import Plan, crop
from acoustic.tasks.base import build_with_head, mask_length, masking_overrides, name_some, refuse_unmaskable


class ClassificationScores(evaluate.Metric):
    """Accuracy and macro-F1, in the package: `evaluate.load` would download a script to run."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy and unweighted mean of the classes' F1.",
            citation="",
            inputs_description="predictions, references: class ids",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        # Classes that occur neither in the references nor in the predictions would count as F1 = 0.
        present = sorted(set(references) | set(predictions))
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "macro_f1": float(f1_score(references, predictions, labels=present, average="macro", zero_division=0)),
        }


class Classification:
    """The labels of a data set and what a model makes of them."""

    auto_class = transformers.AutoModelForAudioClassification
    best_metric, greater_is_better = "accuracy", True
    shown_metrics = ("accuracy", "macro_f1")
    label_kind = "label"

    def __init__(self, rows: Rows, data_args):
        """Collect the classes from the training rows' labels alone; no audio is opened.

        Raises:
            UserError: no labels, or a single class.
        """
        self.counts = Counter(str(label) for label in rows.columns("label") if label not in (None, ""))
        if not self.counts:
            raise UserError(
                f"label_column_name: {rows.description} has no labels: put the clips into one folder per class, or "
                "name the column that holds them"
            )
        if len(self.counts) == 1:
            raise UserError(
                f"{rows.description} has a single class, {next(iter(self.counts))!r}; there is nothing to tell apart"
            )
        self.classes = sorted(self.counts)
        self.ids = {name: index for index, name in enumerate(self.classes)}
        self.last: list[dict] = []

    def notes(self) -> list[str]:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items())[:20])
        notes = [f"{len(self.classes)} classes: {counts}" + (", ..." if len(self.counts) > 20 else "")]
        lone = [name for name, count in self.counts.items() if count == 1]
        if lone:
            notes.append(f"warning: a single clip of {name_some(lone)}: nothing shows what varies within the class")
        return notes

    def subset(self, rows: Rows, labels_per_class: int | None, seed: int) -> Rows:
        """So many clips of each class, drawn by the seed: a label budget."""
        if labels_per_class is None:
            return rows
        if not isinstance(rows, IndexedRows):
            raise UserError("labels_per_class: a stream can't be drawn from; leave out streaming")
        labels = np.array([str(label) for label in rows.columns("label")])
        generator = np.random.default_rng(seed)
        chosen = []
        for name in self.classes:
            available = np.flatnonzero(labels == name)
            if len(available) < labels_per_class:
                raise UserError(f"labels_per_class: {labels_per_class} asked for, {name!r} has {len(available)} clips")
            chosen += generator.permutation(available)[:labels_per_class].tolist()
        self.counts = Counter(dict.fromkeys(self.classes, labels_per_class))
        return rows.take(sorted(chosen))

    def build(self, model_args, random_weights: bool, labeled_seconds: float | None):
        overrides = {
            **masking_overrides(model_args, time=0.25, channel=0.0),
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": self.ids,
        }
        model, feature_extractor, notes = build_with_head(self.auto_class, model_args, random_weights, overrides)
        self.mask_length = mask_length(model.config)
        return model, feature_extractor, notes

    def processing_class(self, feature_extractor):
        return feature_extractor

    def plan(self, data_args, frames, train: bool) -> Plan:
        """One crop of each clip; a clip without a label, or of a class that training never saw, is skipped by name."""
        inner = crop(data_args.min_duration_in_seconds, data_args.max_duration_in_seconds, random=train)

        def plan(row, header, generator):
            if row["label"] in (None, ""):
                raise Skip("no label")
            if str(row["label"]) not in self.ids:
                raise Skip(f"class {str(row['label'])!r} is not among the training classes")
            if train:
                refuse_unmaskable(frames(header.seconds), self.mask_length)
            return inner(row, header, generator)

        return plan

    def encode(self, row: dict) -> int:
        return self.ids[str(row["label"])]

    def count_empty(self, logits: torch.Tensor) -> torch.Tensor | None:
        """A class is never empty."""
        return None

    def count_targets(self, labels: torch.Tensor) -> int:
        return len(labels)

    def summed_loss(self, loss: torch.Tensor, count: int) -> torch.Tensor:
        """transformers' head gives the mean over the clips."""
        return loss * count

    def predictions(self, logits: torch.Tensor, batch: dict) -> list[dict]:
        scores = logits.float().softmax(-1).cpu()
        return [
            {"name": name, "prediction": int(row.argmax()), "reference": int(label), "score": float(row.max())}
            for name, row, label in zip(batch["names"], scores, batch["labels"].cpu())
        ]

    def metrics(self, collected: list[dict]) -> dict[str, float]:
        self.last = collected
        if not collected:
            return {}
        return ClassificationScores(keep_in_memory=True).compute(
            predictions=[item["prediction"] for item in collected],
            references=[item["reference"] for item in collected],
        )

    def remarks(self, metrics: dict[str, float], updates: int) -> list[str]:
        return []

    def readable(self, collected: list[dict]) -> list[dict]:
        """Class names for numbers; the surest mistakes first."""
        named = [
            {**item, "prediction": self.classes[item["prediction"]], "reference": self.classes[item["reference"]]}
            for item in collected
        ]
        return sorted(named, key=lambda item: (item["prediction"] == item["reference"], -item["score"]))

    def figures(self, output_dir: str, split: str, collected: list[dict], figures) -> list:
        """The confusion matrix of one test split: rows are the true class, columns the predicted one."""
        if not collected:
            return []
        counts = confusion_matrix(
            [item["reference"] for item in collected],
            [item["prediction"] for item in collected],
            labels=range(len(self.classes)),
        )
        return [figures.confusion(output_dir, split, counts, self.classes)]

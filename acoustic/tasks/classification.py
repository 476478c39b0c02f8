"""One label for a recording: folder-per-class or a label column -> a classification head, accuracy and macro-F1."""

from collections import Counter

import datasets
import evaluate
import numpy as np
import torch
import transformers
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from acoustic.console import UserError
from acoustic.data.headers import Skip
from acoustic.data.rows import IndexedRows, Rows
from acoustic.data.windows import Plan, crop, divide_evenly
from acoustic.tasks.base import (
    build_with_head,
    load_encoder_config,
    mask_length,
    masking_overrides,
    name_some,
    refuse_unusable,
)
from acoustic.tasks.task import Task


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


# From so many times as many clips of the commonest class as of the rarest one, it is said.
IMBALANCE = 5


class Classification(Task):
    """The labels of a data set and what a model makes of them. See multilabel.py for several classes at once."""

    auto_class = transformers.AutoModelForAudioClassification
    best_metric, greater_is_better = "accuracy", True
    shown_metrics = ("accuracy", "macro_f1")
    label_kind = "label"
    model_inputs = ("input_values", "attention_mask", "labels")

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
        (most, many), (least, few) = self.counts.most_common()[0], self.counts.most_common()[-1]
        if many >= IMBALANCE * few:
            notes.append(
                f"warning: {many} clips of {most!r} and {few} of {least!r}: accuracy hides what happens to rare "
                "classes; look at macro_f1 and at the figure by class, or give labels_per_class"
            )
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

    def overrides(self) -> dict:
        """Of the model's config."""
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": self.ids,
        }

    def build(self, model_args, random_weights: bool, labeled_seconds: float | None, weighted_layer_sum: bool = False):
        encoder = load_encoder_config(model_args.model_name_or_path, model_args.model_revision)
        overrides = {**masking_overrides(encoder, time=0.25, channel=0.0), **self.overrides()}
        model, feature_extractor, notes = build_with_head(
            self.auto_class, model_args, random_weights, overrides, weighted_layer_sum
        )
        self.mask_length = mask_length(model.config)
        return model, feature_extractor, notes

    def refuse(self, label) -> str | None:
        """Why a label can't be used, if it can't."""
        if label in (None, ""):
            return "no label"
        return None if str(label) in self.ids else f"class {str(label)!r} is not among the training classes"

    def plan(self, data_args, frames, train: bool) -> Plan:
        """In training a part of each clip, another one each time; else all of it, in equal parts that are pooled."""
        limits = data_args.min_duration_in_seconds, data_args.max_duration_in_seconds
        inner = crop(*limits, random=True) if train else divide_evenly(*limits)

        def plan(row, header, generator):
            if reason := self.refuse(row["label"]):
                raise Skip(reason)
            refuse_unusable(frames(header.seconds), self.mask_length if train else 0)
            return inner(row, header, generator)

        return plan

    def encode(self, row: dict) -> int:
        return self.ids[str(row["label"])]

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().softmax(-1)

    def reference(self, label: torch.Tensor):
        return int(label)

    def predictions(self, logits: torch.Tensor, batch: dict) -> list[dict]:
        scores = self.probabilities(logits).cpu().numpy()
        alones = batch.get("alone") or [True] * len(scores)
        return [
            {"name": name, "scores": row, "reference": self.reference(label), "alone": alone}
            for name, row, label, alone in zip(batch["names"], scores, batch["labels"].cpu(), alones)
        ]

    def metrics(self, collected: list[dict]) -> dict[str, float]:
        self.last = pool(collected)
        return self.score(self.last) if self.last else {}

    def score(self, pooled: list[dict]) -> dict[str, float]:
        return ClassificationScores(keep_in_memory=True).compute(
            predictions=[int(item["scores"].argmax()) for item in pooled],
            references=[item["reference"] for item in pooled],
        )

    def readable(self, collected: list[dict]) -> list[dict]:
        """Class names for numbers; the surest mistakes first."""
        named = [
            {
                "name": item["name"],
                "prediction": self.classes[item["scores"].argmax()],
                "reference": self.classes[item["reference"]],
                "score": float(item["scores"].max()),
            }
            for item in collected
        ]
        return sorted(named, key=lambda item: (item["prediction"] == item["reference"], -item["score"]))

    def figures(self, output_dir: str, split: str, collected: list[dict], figures) -> list:
        """The confusion matrix of a test split (rows are the true class), and each class by itself."""
        if not collected:
            return []
        ids = range(len(self.classes))
        references = [item["reference"] for item in collected]
        predictions = [int(item["scores"].argmax()) for item in collected]
        counts = confusion_matrix(references, predictions, labels=ids)
        precision, recall, f1, there = precision_recall_fscore_support(
            references, predictions, labels=ids, zero_division=np.nan
        )
        rows = [f"{name} ({count})" for name, count in zip(self.classes, there)]
        title = f"{split}: by class, in brackets its clips"
        return [
            figures.confusion(output_dir, split, counts, self.classes),
            figures.classes.bars_by_class(
                output_dir, f"by_class_{split}", title, rows, {"F1": f1, "precision": precision, "recall": recall}
            ),
        ]


def pool(windows: list[dict]) -> list[dict]:
    """Windows of any batches and processes -> their clips: the mean of the windows' probabilities.

    Clips of one window each may share a name, as those without a path do where the same audio comes twice.
    """
    clips: dict[str | int, list[dict]] = {}
    for number, window in enumerate(windows):
        clips.setdefault(number if window["alone"] else window["name"], []).append(window)
    return [{**parts[0], "scores": np.mean([part["scores"] for part in parts], axis=0)} for parts in clips.values()]

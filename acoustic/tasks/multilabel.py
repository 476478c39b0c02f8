"""Several classes at once: a label is a list of them, "a|b" in a table, or a column of zeros and ones for each."""

from collections import Counter
from collections.abc import Callable

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score

from acoustic.console import UserError, say
from acoustic.data.rows import IndexedRows, Rows
from acoustic.tasks.base import name_some
from acoustic.tasks.classification import Classification

SEPARATOR = "|"
# How much more a class counts where it is there than where it isn't: at most so much, or one over it.
MAX_POSITIVE_WEIGHT = 10.0
DEFAULT_THRESHOLD = 0.5
# Of a class in the held-out part, for a threshold of its own to mean something.
FEW_CLIPS = 5


def has_several(rows: Rows) -> bool:
    """Whether a label can name several classes: one of them does, or is a list."""
    return any(isinstance(label, (list, tuple)) or SEPARATOR in str(label or "") for label in rows.columns("label"))


def labels_of(value) -> list[str] | None:
    """The classes that a label names, each once; none for an empty list or text; None where nothing is said."""
    if value is None:
        return None
    parts = value if isinstance(value, (list, tuple)) else str(value).split(SEPARATOR)
    return list(dict.fromkeys(str(part).strip() for part in parts if part is not None and str(part).strip()))


class MultiLabelScores(evaluate.Metric):
    """Mean average precision, micro and macro F1, in the package: `evaluate.load` would download a script to run."""

    def _info(self):
        numbers = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description="Mean of the classes' average precision, and F1 over all decisions and as the classes' mean.",
            citation="",
            inputs_description="predictions: probabilities, references: 0 or 1, a list by class for each clip",
            features=datasets.Features({"predictions": numbers, "references": numbers}),
        )

    def _compute(self, predictions, references, thresholds):
        scores, truth = np.array(predictions), np.array(references, dtype=int)
        decided = (scores >= np.asarray(thresholds)).astype(int)
        present = truth.any(0)  # of a class that never occurs there is no ranking to judge
        precision = average_precisions(scores, truth)
        return {
            "map": float(np.nanmean(precision)) if present.any() else 0.0,
            "micro_f1": float(f1_score(truth, decided, average="micro", zero_division=0)),
            "macro_f1": float(f1_score(truth[:, present], decided[:, present], average="macro", zero_division=0))
            if present.any()
            else 0.0,
        }


def average_precisions(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(clips, classes) twice -> (classes,); NaN where a class never occurs."""
    return np.array(
        [
            average_precision_score(truth[:, index], scores[:, index]) if truth[:, index].any() else np.nan
            for index in range(truth.shape[1])
        ]
    )


def choose_thresholds(scores: np.ndarray, truth: np.ndarray) -> list[float]:
    """For each class the threshold with the best F1, half way between two scores; of equal ones that nearest to 0.5.

    DEFAULT_THRESHOLD where a class never occurs.
    """
    return [best_threshold(scores[:, index], truth[:, index]) for index in range(truth.shape[1])]


def best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    if not truth.any():
        return DEFAULT_THRESHOLD
    values = np.unique(scores)
    candidates = np.concatenate([[DEFAULT_THRESHOLD], values[:1], (values[1:] + values[:-1]) / 2])
    decided = len(scores) - np.searchsorted(np.sort(scores), candidates)
    hits = (truth > 0).sum() - np.searchsorted(np.sort(scores[truth > 0]), candidates)
    f1 = 2 * hits / (decided + truth.sum())
    best = candidates[f1 >= f1.max() - 1e-12]
    return round(float(best[np.abs(best - DEFAULT_THRESHOLD).argmin()]), 4)


class MultiLabel(Classification):
    """Binary cross-entropy for each class; a threshold for each, chosen on the held-out part."""

    best_metric = "map"
    shown_metrics = ("map", "micro_f1", "macro_f1")
    model_inputs = ("input_values", "attention_mask")  # the head's own loss is that of a single class

    def __init__(self, rows: Rows, data_args):
        labels = [labels_of(value) for value in rows.columns("label")]
        self.num_clips = sum(found is not None for found in labels)
        self.num_none = sum(found == [] for found in labels)
        self.counts = Counter(name for found in labels for name in found or ())
        if not self.counts:
            raise UserError(f"label_column_name: {rows.description} has no labels: no class is there in any clip")
        self.classes = sorted(self.counts)
        self.ids = {name: index for index, name in enumerate(self.classes)}
        self.thresholds = [DEFAULT_THRESHOLD] * len(self.classes)
        self.last: list[dict] = []

    def notes(self) -> list[str]:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items())[:20])
        more = ", ..." if len(self.classes) > 20 else ""
        none = f", {self.num_none} with none" if self.num_none else ""
        notes = [f"several classes at once: {len(self.classes)} in {self.num_clips} clips{none}: {counts}{more}"]
        weights = zip(self.classes, self.positive_weights().tolist())
        weighted = [f"{name} {weight:.1f}" for name, weight in weights if not 0.5 < weight < 2]
        if weighted:
            more = ", ..." if len(weighted) > 20 else ""
            rule = f"clips without it over clips with it, at most {MAX_POSITIVE_WEIGHT:g}"
            listed = ", ".join(weighted[:20])
            notes.append(f"uneven classes: a clip with one weighs more or less in the loss ({rule}): {listed}{more}")
        if lone := [name for name, count in self.counts.items() if count == 1]:
            notes.append(f"warning: a single clip of {name_some(lone)}: nothing shows what varies within the class")
        return notes

    def positive_weights(self) -> torch.Tensor:
        """(classes,): clips without a class over clips with it, within bounds."""
        counts = torch.tensor([self.counts[name] for name in self.classes], dtype=torch.float32)
        return ((self.num_clips - counts) / counts).clamp(1 / MAX_POSITIVE_WEIGHT, MAX_POSITIVE_WEIGHT)

    def subset(self, rows: Rows, labels_per_class: int | None, seed: int) -> Rows:
        """Clips in an order drawn by the seed: each that has a class of which there are too few so far.

        So a class has at least so many, often more, and a smaller budget's clips are among a larger one's: those that
        the smaller one left out are looked at again.
        """
        if labels_per_class is None:
            return rows
        if not isinstance(rows, IndexedRows):
            raise UserError("labels_per_class: a stream can't be drawn from; leave out streaming")
        for name in self.classes:
            if self.counts[name] < labels_per_class:
                raise UserError(
                    f"labels_per_class: {labels_per_class} asked for, {name!r} has {self.counts[name]} clips"
                )
        labels = [labels_of(value) or [] for value in rows.columns("label")]
        order = np.random.default_rng(seed).permutation(len(labels)).tolist()
        chosen, counts = set(), Counter()
        for budget in range(1, labels_per_class + 1):
            for index in order:
                if index not in chosen and any(counts[name] < budget for name in labels[index]):
                    chosen.add(index)
                    counts.update(labels[index])
        self.counts, self.num_clips, self.num_none = counts, len(chosen), 0
        return rows.take(sorted(chosen))

    def overrides(self) -> dict:
        return {**super().overrides(), "problem_type": "multi_label_classification"}

    def build(self, *args, **kwargs):
        model, feature_extractor, notes = super().build(*args, **kwargs)
        self.config, self.weights = model.config, self.positive_weights()
        self.config.thresholds = self.thresholds
        return model, feature_extractor, notes

    def unseen(self, splits: dict[str, Rows | None]) -> list[str]:
        """Labels that training never saw can't be predicted: they are left out, the rest of their clips counts."""
        said = []
        for split, rows in splits.items():
            values = rows.columns("label") if rows else ()
            found = {name for value in values for name in labels_of(value) or ()}
            unknown = sorted(found - set(self.classes))
            if unknown:
                said.append(
                    f"warning: {split}: {name_some(unknown)}, which training never saw, are left out of the scores"
                )
        return said

    def refuse(self, label) -> str | None:
        return "no label" if labels_of(label) is None else None

    def encode(self, row: dict) -> list[float]:
        """(classes,) 0 or 1."""
        named = set(labels_of(row["label"]))
        return [float(name in named) for name in self.classes]

    def summed_loss(self, outputs, labels: torch.Tensor, count: int) -> torch.Tensor:
        """Binary cross-entropy in float32, the mean over the classes and the sum over the clips."""
        weights = self.weights.to(labels.device)
        losses = F.binary_cross_entropy_with_logits(
            outputs.logits.float(), labels.float(), pos_weight=weights, reduction="none"
        )
        return losses.mean(-1).sum()

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().sigmoid()

    def reference(self, label: torch.Tensor) -> list[int]:
        return label.int().tolist()

    def score(self, pooled: list[dict]) -> dict[str, float]:
        return MultiLabelScores(keep_in_memory=True).compute(
            predictions=[item["scores"].tolist() for item in pooled],
            references=[item["reference"] for item in pooled],
            thresholds=self.thresholds,
        )

    def settle(self, evaluate: Callable[[], dict] | None) -> list[str]:
        """After training: thresholds from the held-out part, into the model's config."""
        notes = ["thresholds: 0.5 for all classes, as there is no held-out part to choose them by (eval_split_name)"]
        if evaluate is not None and evaluate():
            scores, truth = arrays(self.last)
            self.thresholds = choose_thresholds(scores, truth)
            self.config.thresholds = self.thresholds
            listed = [f"{name} {value:g}" for name, value in zip(self.classes, self.thresholds)]
            notes = [f"thresholds, chosen on the held-out part (F1 of each class): {first(listed)}"]
            few = [f"{name} ({count})" for name, count in zip(self.classes, truth.sum(0)) if count < FEW_CLIPS]
            if few:
                notes.append(f"heard in fewer than {FEW_CLIPS} held-out clips, so its threshold is luck: {first(few)}")
        for note in notes:
            say(note)
        return notes

    def decided(self, scores: np.ndarray) -> list[str]:
        return [name for name, score, least in zip(self.classes, scores, self.thresholds) if score >= least]

    def readable(self, collected: list[dict]) -> list[dict]:
        """The clips with most wrong decisions first, and of those the surest mistakes."""
        items = []
        for item in collected:
            wrong = ((item["scores"] >= self.thresholds) != np.array(item["reference"], bool)).sum()
            apart = float(np.abs(item["scores"] - item["reference"]).max())
            named = {
                "name": item["name"],
                "prediction": self.decided(item["scores"]),
                "reference": [name for name, there in zip(self.classes, item["reference"]) if there],
                "scores": {name: round(float(score), 4) for name, score in zip(self.classes, item["scores"])},
            }
            items.append((-wrong, -apart, item["name"], named))
        return [named for *_, named in sorted(items, key=lambda entry: entry[:3])]

    def figures(self, output_dir: str, split: str, collected: list[dict], figures) -> list:
        """Average precision and F1 of each class, with how often it is there and its threshold."""
        if not collected:
            return []
        scores, truth = arrays(collected)
        decided = scores >= np.array(self.thresholds)
        bars = {
            "average precision": average_precisions(scores, truth),
            "F1": f1_score(truth, decided, average=None, zero_division=0),
        }
        rows = [f"{name} ({count})" for name, count in zip(self.classes, truth.sum(0))]
        title = f"{split}: by class, in brackets how many of {len(truth)} clips have it"
        return [figures.classes.bars_by_class(output_dir, f"by_class_{split}", title, rows, bars)]


def first(words: list[str], limit: int = 20) -> str:
    return ", ".join(words[:limit] + ["..."] * (len(words) > limit))


def arrays(collected: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(clips, classes) of scores and of 0 or 1."""
    return np.stack([item["scores"] for item in collected]), np.array([item["reference"] for item in collected])

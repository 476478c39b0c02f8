"""How a task's labels are learned from frozen layers: which frames are kept, which probe, which scores."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from acoustic.console import UserError
from acoustic.data.rows import IndexedRows
from acoustic.data.tally import Tally
from acoustic.data.windows import whole
from acoustic.tasks import attentive, ctc_probe
from acoustic.tasks.ctc import normalize
from acoustic.tasks.ctc_probe import Utterances, hypotheses
from acoustic.tasks.embeddings import BATCH_SECONDS, listen
from acoustic.training.listening import Heard, hear

# Frames that are nearer to each other are averaged: log-mel bands have one every 10 ms.
FRAME_SECONDS = 0.02
# What is compared beside a task's best_metric.
MORE_METRICS = {"text": ("cer",)}


@dataclass(frozen=True)
class Scores:
    """What is compared: the first of `metrics` has the split's name as its column, others split_metric."""

    metrics: tuple[str, ...]
    greater_is_better: bool

    def column(self, split: str, metric: str) -> str:
        return split if metric == self.metrics[0] else f"{split}_{metric}"

    def columns(self, split: str, scores: dict[str, float]) -> dict[str, float]:
        return {self.column(split, metric): scores[metric] for metric in self.metrics}

    def rank(self, columns: dict[str, float], split: str) -> tuple[float, ...]:
        """Higher is better; the first metric decides, the next one among equals."""
        sign = 1 if self.greater_is_better else -1
        return tuple(sign * columns[self.column(split, metric)] for metric in self.metrics)


def make_probing(task, data_args):
    return (Speech if task.label_kind == "text" else Clips)(task, data_args)


class Probing:
    """Of one task: `hear` a start's frames, `fit_best` a probe to some of them, `score` it on others."""

    def __init__(self, task, data_args):
        self.task, self.data_args = task, data_args
        metrics = (task.best_metric, *MORE_METRICS.get(task.label_kind, ()))
        self.scores = Scores(metrics, task.greater_is_better)

    def fit_best(self, train, validation, seed: int):
        """The probe, and its learning rate, that does best on the validation clips; the lower rate among equals."""
        tried = [(self.fit(train, rate, seed), rate) for rate in self.rates]
        ranks = [self.scores.rank(self.scores.columns("", self.score(probe, validation)), "") for probe, _ in tried]
        return tried[max(range(len(tried)), key=lambda number: ranks[number])]


class Clips(Probing):
    """One class or several for a whole clip: the attentive probe."""

    rates = attentive.LEARNING_RATES

    def hear(self, encoder, rows: IndexedRows, title: str, quiet: bool) -> Heard:
        return hear(encoder, rows, self.task, self.data_args, title, quiet)

    def fit(self, train: Heard, learning_rate: float, seed: int) -> attentive.AttentiveProbe:
        return attentive.fit(*train.pair, len(self.task.classes), learning_rate, seed)

    @torch.no_grad()
    def score(self, probe: attentive.AttentiveProbe, heard: Heard) -> dict[str, float]:
        frames, labels = heard.pair
        return self.task.metrics(self.task.predictions(probe(frames), {"names": heard.names, "labels": labels}))


class Speech(Probing):
    """Characters in time."""

    rates = ctc_probe.LEARNING_RATES

    def hear(self, encoder, rows: IndexedRows, title: str, quiet: bool) -> Utterances:
        """All of each recording that has a transcript and can be read."""
        texts = {row["name"]: normalize(row["text"]) for row in (rows[index] for index in range(len(rows)))}
        spoken = rows.select(lambda row: bool(normalize(row["text"])))
        limits = self.data_args.min_duration_in_seconds, self.data_args.max_duration_in_seconds
        every = max(round(FRAME_SECONDS / encoder.frame_seconds), 1)
        heard = listen(encoder, spoken, whole(*limits), Tally(), max(BATCH_SECONDS, limits[1]))
        found = Utterances([], [], [], [])
        for window, layers in tqdm(heard, title, total=len(spoken), leave=False, disable=quiet or None):
            text = texts[window["name"]]
            found.names.append(window["name"])
            found.texts.append(text)
            found.frames.append(average(layers, every).half())
            found.labels.append(self.task.encode({"text": text}))
        if not found.names:
            raise UserError(f"dataset_name: none of the recordings of {rows.description} can be used")
        return found

    def fit(self, train: Utterances, learning_rate: float, seed: int) -> ctc_probe.CTCProbe:
        return ctc_probe.fit(train, len(self.task.vocabulary), learning_rate, seed)

    def score(self, probe: ctc_probe.CTCProbe, heard: Utterances) -> dict[str, float]:
        return self.task.metrics(hypotheses(probe, heard, self.task.greedy))


def average(layers: torch.Tensor, every: int) -> torch.Tensor:
    """(layers, frames, width) -> the same with the means of so many neighbours each."""
    if every == 1:
        return layers
    return F.avg_pool1d(layers.transpose(1, 2), every, ceil_mode=True, count_include_pad=False).transpose(1, 2)

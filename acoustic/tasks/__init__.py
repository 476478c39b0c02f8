"""Downstream tasks by name: each knows its labels, its head, its metrics and its figures."""

from acoustic.tasks.classification import Classification
from acoustic.tasks.ctc import CTC
from acoustic.tasks.multilabel import MultiLabel, has_several
from acoustic.tasks.segmentation import Segmentation
from acoustic.tasks.task import Task

TASKS = {"classification": Classification, "ctc": CTC, "segmentation": Segmentation}


def make_task(name: str, rows, data_args) -> Task:
    """What the training rows' labels ask for: classification of one class, or of several at once."""
    if name == "classification" and has_several(rows):
        return MultiLabel(rows, data_args)
    return TASKS[name](rows, data_args)

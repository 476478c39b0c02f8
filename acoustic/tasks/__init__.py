"""Downstream tasks by name: each knows its labels, its head, its metrics and its figures."""

from acoustic.tasks.classification import Classification
from acoustic.tasks.ctc import CTC

TASKS = {"classification": Classification, "ctc": CTC}

"""Does it sound wrong, and where most."""

from collections.abc import Iterator

import numpy as np
import torch

from acoustic.console import UserError
from acoustic.data.headers import Header, Skip
from acoustic.data.spans import Span
from acoustic.data.windows import Plan
from acoustic.predict.predictor import Predictor
from acoustic.tasks.anomaly import AnomalyDetector


class AnomalyScorer(Predictor):
    """{"score", "percentile", "worst": {"start", "end", "score", "percentile"}, "machine" where one is known}.

    machine: of all recordings; None where there is one machine, or where each row names its own ("machine").

    Score and percentile are those of the worst window, in which normal recordings lie from 0 to 100; "worst" is the
    worst segment of half a second. See `Verdict`.
    """

    has_times = True

    def __init__(
        self, detector: AnomalyDetector, machine: str | None, by_row: bool, batch_seconds: float | None, device
    ):
        if not by_row:
            detector.check_machine(machine)
        super().__init__(detector.encoder.rate, detector.settings.window_seconds, batch_seconds, device)
        self.detector, self.machine = detector, machine

    def predict(self, row: dict, header: Header, progress=lambda seconds: None) -> dict:
        if "machine" in row:
            self.machine = None if row["machine"] in (None, "") else str(row["machine"])
            try:
                self.detector.check_machine(self.machine)
            except UserError as error:
                raise Skip(str(error)) from None
        return super().predict(row, header, progress)

    def plan(self) -> Plan:
        return self.detector.plan()

    def hear(self, waveforms: np.ndarray) -> list[torch.Tensor]:
        """(layers, frames, width) of each."""
        return self.detector.encoder.layers(list(waveforms))

    def answer(self, header: Header, heard: Iterator) -> dict:
        verdict = self.detector.judge(
            ((about(window, self.machine), frames) for window, frames in heard), self.machine
        )
        if not verdict.windows:
            raise Skip(f"{header.seconds:.3f} s are too short for two frames")
        worst = verdict.worst_segment
        answer = {
            "score": round(verdict.score, 4),
            "percentile": round(verdict.percentile, 2),
            "worst": {
                "start": round(worst.start, 3),
                "end": round(worst.stop, 3),
                "score": round(worst.score, 4),
                "percentile": round(worst.percentile, 2),
            },
        }
        return answer if self.machine is None else {**answer, "machine": self.machine}

    def spans(self, answer: dict) -> list[Span]:
        worst = answer["worst"]
        return [Span(worst["start"], worst["end"], f"percentile {worst['percentile']:g}")]


def about(window, machine: str | None) -> dict:
    """What a detector is told of a window."""
    start = window.start / window.rate
    return {"name": "", "label": None, "machine": machine, "start": start, "seconds": window.seconds}


def load_scorer(name: str, machine: str | None, by_row: bool, batch_seconds: float | None, device) -> AnomalyScorer:
    """Raises `UserError`: the detector can't be loaded, or doesn't know the machine."""
    try:
        detector = AnomalyDetector.from_pretrained(name, device=device)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: its anomaly_detector.json is not what run_finetune.py writes: {error}") from None
    return AnomalyScorer(detector, machine, by_row, batch_seconds, device)

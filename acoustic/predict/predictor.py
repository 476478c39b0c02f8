"""What all tasks share: a recording of any length is read window by window, and what was heard becomes one answer.

What a recording needs of memory are its frames' probabilities, not its audio: an hour is some megabytes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np
import torch

from acoustic.console import UserError
from acoustic.data.collate import extract
from acoustic.data.decode import read_window
from acoustic.data.headers import Header, Skip
from acoustic.data.spans import Span
from acoustic.data.windows import Plan, Window
from acoustic.tasks.events import FrameGrid

# On a GPU several windows are heard together; on a CPU that is no faster, and takes more memory.
GPU_BATCH_SECONDS = 120.0


class Predictor:
    """
    Args:
        rate: Hz at which the model hears.
        max_seconds: the longest window.
        batch_seconds: audio that is heard together; default: GPU_BATCH_SECONDS, and on a CPU one window.
    """

    has_times = False  # whether `spans` finds something in an answer

    def __init__(self, rate: int, max_seconds: float, batch_seconds: float | None, device):
        self.rate, self.device = rate, torch.device(device)
        default = max_seconds if self.device.type == "cpu" else max(GPU_BATCH_SECONDS, max_seconds)
        self.batch_seconds = batch_seconds or default
        if self.batch_seconds < max_seconds:
            raise UserError(
                f"batch_seconds ({self.batch_seconds:g}) holds no window of {max_seconds:g} s; raise it, or lower "
                "max_duration_in_seconds"
            )

    def plan(self) -> Plan:
        """Which windows of a recording are heard."""
        raise NotImplementedError

    def hear(self, waveforms: np.ndarray) -> list[torch.Tensor]:
        """(batch, samples) -> what the model makes of each, on the CPU. Raises `Skip` where they are too short."""
        raise NotImplementedError

    def answer(self, header: Header, heard: Iterator[tuple[Window, torch.Tensor]]) -> dict:
        """Of the windows of one recording, in their order, and what `hear` makes of each."""
        raise NotImplementedError

    def spans(self, answer: dict) -> list[Span]:
        """Of an answer, what a label file can hold."""
        raise NotImplementedError

    def predict(self, row: dict, header: Header, progress: Callable[[float], None] = lambda seconds: None) -> dict:
        """The answer; with "unread", [{"start", "end", "reason"}] in seconds, where some of it could not be read.

        Args:
            row: as `open_rows` gives it; "audio" and "name" are read.
            progress: told the seconds that were gone through so far.

        Raises:
            Skip: nothing of the recording can be read, or it is too short.
        """
        unread: list[dict] = []
        heard = self.listen(row, header, unread, progress)
        first = next(heard, None)
        if first is None:
            raise Skip(unread[0]["reason"])
        answer = self.answer(header, chain([first], heard))
        return {**answer, "unread": unread} if unread else answer

    def listen(self, row: dict, header: Header, unread: list[dict], progress) -> Iterator[tuple[Window, torch.Tensor]]:
        """Windows of one length are heard together. Nothing is padded, so an answer doesn't depend on the others."""
        for windows in together(self.plan()(row, header, None), self.batch_seconds):
            alike, found = defaultdict(list), {}
            for window, waveform in readable(row, windows, self.rate, unread):
                alike[len(waveform)].append((window.start, waveform))
            for group in alike.values():
                found |= zip([start for start, _ in group], self.hear(np.stack([waveform for _, waveform in group])))
            yield from ((window, found[window.start]) for window in windows if window.start in found)
            progress(windows[-1].stop / windows[-1].rate)


class Head(Predictor):
    """A model with a head, of transformers or ours, in evaluation."""

    auto_class: type

    def __init__(self, name: str, model, extractor, max_seconds: float, batch_seconds: float | None = None):
        super().__init__(extractor.sampling_rate, max_seconds, batch_seconds, model.device)
        self.name, self.model, self.extractor, self.max_seconds = name, model, extractor, max_seconds
        self.lengths = model._get_feat_extract_output_lengths
        self.grid = FrameGrid.of(self.lengths, model.config.inputs_to_logits_ratio, self.rate)

    @property
    def classes(self) -> list[str]:
        return [self.model.config.id2label[index] for index in range(self.model.config.num_labels)]

    @torch.no_grad()
    def hear(self, waveforms: np.ndarray) -> list[torch.Tensor]:
        """Logits of each, (classes,) or (frames, classes) float32."""
        if int(self.lengths(waveforms.shape[1])) < 1:
            raise Skip(f"{waveforms.shape[1] / self.rate:.3f} s are too short for a frame")
        inputs = extract(self.extractor, list(waveforms))
        logits = self.model(**{name: value.to(self.device) for name, value in inputs.items()}).logits
        return list(logits.float().cpu())


def together(windows, most: float) -> Iterator[list[Window]]:
    """Windows in their order, so many at a time that they are no longer than `most` seconds."""
    batch: list[Window] = []
    for window in windows:
        if batch and sum(each.seconds for each in (*batch, window)) > most + 1e-6:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def readable(row: dict, windows: list[Window], rate: int, unread: list[dict]) -> Iterator[tuple[Window, np.ndarray]]:
    """Windows with their audio; `unread` gets the others, those that follow one another as one."""
    for window in windows:
        try:
            yield window, read_window(row["audio"], window.start, window.stop, rate)
        except Skip as skip:
            start, end = (round(frame / window.rate, 3) for frame in (window.start, window.stop))
            if unread and unread[-1]["end"] >= start:
                unread[-1]["end"] = end
            else:
                unread.append({"start": start, "end": end, "reason": str(skip)})

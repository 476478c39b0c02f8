"""Waveforms -> the model's inputs, scaled as the model's feature extractor says."""

import numpy as np
import torch

from acoustic.data.windows import Window


class Rectangle:
    """Pretraining: windows of one length, without padding or attention mask.

    Returns {"input_values": (batch, samples) float32}.
    """

    def __init__(self, feature_extractor):
        self.feature_extractor = feature_extractor

    def __call__(self, windows: list[Window], waveforms: list[np.ndarray]) -> dict:
        # A window at 11,025 Hz can come out one sample longer than one at 16 kHz of the same length in seconds.
        rate = self.feature_extractor.sampling_rate
        length = int(min(window.seconds for window in windows) * rate + 1e-6)
        length = min(length, *map(len, waveforms))
        cut = [waveform[:length] for waveform in waveforms]
        return {"input_values": self.feature_extractor(cut, sampling_rate=rate, return_tensors="pt")["input_values"]}


class PadToLongest:
    """Fine-tuning: padded to the longest, with an attention mask where the feature extractor gives one.

    `encode(row)` gives the label of a row: an int, or a list of ints (or of rows of them) that is padded with -100.
    Returns {"input_values": (batch, samples), "labels": (batch,), (batch, tokens) or (batch, frames, classes),
    ["attention_mask"], "names", "texts", "places": where in its recording a window is, if its task said so,
    "alone": whether it is the recording's only one}.
    """

    def __init__(self, feature_extractor, encode):
        self.feature_extractor, self.encode = feature_extractor, encode

    def __call__(self, windows: list[Window], waveforms: list[np.ndarray]) -> dict:
        labels = [torch.tensor(self.encode(window.row)) for window in windows]
        if labels[0].dim():
            labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        else:
            labels = torch.stack(labels)
        rows = [window.row for window in windows]
        return {
            **extract(self.feature_extractor, waveforms),
            "labels": labels,
            "names": [row["name"] for row in rows],
            "texts": [row["text"] for row in rows],
            "places": [row.get("place") for row in rows],
            "alone": [window.alone for window in windows],
        }


def extract(feature_extractor, waveforms: list[np.ndarray]) -> dict:
    """The feature extractor's own scaling and padding; its rate is the rate at which the audio was read."""
    # One at a time: without an attention mask, transformers would scale a clip together with its padding.
    rate = feature_extractor.sampling_rate
    scaled = [feature_extractor(waveform, sampling_rate=rate)["input_values"][0] for waveform in waveforms]
    return dict(feature_extractor.pad({"input_values": scaled}, padding=True, return_tensors="pt"))

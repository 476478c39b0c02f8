"""Waveforms -> the rectangle that the model takes."""

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor

from acoustic.data.collate import PadToLongest, Rectangle, extract
from acoustic.data.windows import Window

PLAIN = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=False)
SCALED = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)


def ramps(*lengths) -> list[np.ndarray]:
    """Waveforms whose samples say where they come from: recording r's sample i is 1000 r + i."""
    return [(1000 * number + np.arange(length)).astype(np.float32) for number, length in enumerate(lengths)]


def windows_of(rows: list[dict]) -> list[Window]:
    return [Window(row, 0, 1, 16_000, 1.0) for row in rows]


def windows_of_seconds(*seconds) -> list[Window]:
    return [Window({"name": "a"}, 0, 1, 16_000, length) for length in seconds]


def test_rectangle_is_the_windows_themselves():
    values = Rectangle(PLAIN)(windows_of_seconds(0.005, 0.005, 0.005), ramps(80, 80, 80))["input_values"]
    assert values.shape == (3, 80) and values.dtype == torch.float32
    for number, row in enumerate(values):
        assert torch.equal(row, 1000 * number + torch.arange(80.0))


def test_rectangle_has_no_mask_and_no_padding():
    """A window at 11,025 Hz may come out a sample longer than its seconds: cut. A shorter one cuts the others."""
    batch = Rectangle(SCALED)(windows_of_seconds(0.005, 0.005), ramps(81, 80))
    assert set(batch) == {"input_values"} and batch["input_values"].shape == (2, 80)
    values = Rectangle(PLAIN)(windows_of_seconds(0.005, 0.005), ramps(81, 79))["input_values"]
    assert values.tolist() == [list(range(79)), list(range(1000, 1079))]


def test_the_length_is_that_of_the_shortest_window_in_seconds():
    """Not of a waveform that rounding made longer: shapes repeat."""
    for lengths in ((161, 161), (160, 162)):
        assert Rectangle(PLAIN)(windows_of_seconds(0.01, 0.01), ramps(*lengths))["input_values"].shape == (2, 160)


def test_scaled_as_the_feature_extractor_says():
    values = Rectangle(SCALED)(windows_of_seconds(0.025, 0.025), ramps(400, 400))["input_values"]
    np.testing.assert_allclose(values.mean(dim=1), 0, atol=1e-5)
    np.testing.assert_allclose(values.var(dim=1, correction=0), 1, atol=1e-4)


def test_pad_to_longest_with_class_labels():
    rows = [{"name": "a", "text": None, "label": 1}, {"name": "b", "text": None, "label": 0}]
    batch = PadToLongest(SCALED, lambda row: row["label"])(windows_of(rows), ramps(30, 50))
    assert batch["input_values"].shape == (2, 50)
    assert batch["attention_mask"].sum(dim=1).tolist() == [30, 50]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["names"] == ["a", "b"]


@pytest.mark.parametrize(("extractor", "masked"), [(PLAIN, False), (SCALED, True)])
def test_pad_to_longest_with_token_labels(extractor, masked):
    rows = [{"name": "a", "text": "hello"}, {"name": "b", "text": "x"}]
    batch = PadToLongest(extractor, lambda row: [ord(char) for char in row["text"]])(windows_of(rows), ramps(30, 50))
    assert batch["labels"].tolist() == [[ord(char) for char in "hello"], [ord("x"), -100, -100, -100, -100]]
    assert batch["texts"] == ["hello", "x"]
    assert ("attention_mask" in batch) == masked


def test_a_clip_is_scaled_the_same_beside_longer_ones():
    """Without an attention mask transformers would scale a short clip together with its padding."""
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    generator = np.random.default_rng(0)
    short, long = (generator.standard_normal(length).astype(np.float32) for length in (800, 3200))
    alone = extract(extractor, [short])["input_values"][0]
    beside = extract(extractor, [short, long])["input_values"][0]
    assert torch.equal(beside[:800], alone)
    assert not beside[800:].any()

"""Embeddings of recordings: equal to the model's own, whatever the batches and pieces are."""

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoModel

from acoustic.data.sources import open_rows
from acoustic.tasks.embeddings import embed, load_encoder


def by_hand(checkpoint: str, waveforms: list[np.ndarray]) -> np.ndarray:
    """(layers, 2 * width): each piece alone, moments over the frames of all."""
    model, extractor = AutoModel.from_pretrained(checkpoint).eval(), AutoFeatureExtractor.from_pretrained(checkpoint)
    pieces = []
    for waveform in waveforms:
        inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            pieces.append(torch.cat(model(**inputs, output_hidden_states=True).hidden_states))
    frames = torch.cat(pieces, 1)
    return torch.cat([frames.mean(1), frames.std(1, unbiased=False)], -1).numpy()


def read(path) -> np.ndarray:
    return soundfile.read(path, dtype="float32")[0]


@pytest.mark.parametrize("kind", ["group_norm_checkpoint", "layer_norm_checkpoint"])
def test_equal_to_each_recording_alone(kind, request, audio_folder):
    checkpoint = request.getfixturevalue(kind)
    folder = audio_folder(5, seconds=[0.6, 1.3, 0.9, 1.3, 2.0])
    found = embed(load_encoder(checkpoint), open_rows(str(folder)))
    assert found.names == [f"clip_{index:03d}.wav" for index in range(5)]
    assert found.values.shape == (5, 3, 64)
    for name, values in zip(found.names, found.values):
        np.testing.assert_allclose(values, by_hand(checkpoint, [read(folder / name)]), atol=2e-5)


def test_long_recordings_in_equal_pieces(layer_norm_checkpoint, audio_folder):
    folder = audio_folder(2, seconds=[2.5, 0.7])
    found = embed(load_encoder(layer_norm_checkpoint), open_rows(str(folder)), max_seconds=1.0, batch_seconds=1.0)
    waveform = read(folder / "clip_000.wav")
    cuts = [len(waveform) * number // 3 for number in range(4)]
    pieces = [waveform[start:stop] for start, stop in zip(cuts, cuts[1:])]
    np.testing.assert_allclose(found.values[0], by_hand(layer_norm_checkpoint, pieces), atol=2e-5)


def test_labels_and_what_was_skipped(layer_norm_checkpoint, audio_folder):
    folder = audio_folder(["dog/a.wav", "cat/b.wav", "cat/short.wav"], seconds=[0.5, 0.5, 0.05])
    (folder / "cat/broken.wav").write_bytes(b"no audio")
    found = embed(load_encoder(layer_norm_checkpoint), open_rows(str(folder), label_column="label"), workers=1)
    assert dict(zip(found.names, found.labels)) == {"cat/b.wav": "cat", "dog/a.wav": "dog"}
    assert set(found.skipped.listed) == {"cat/short.wav", "cat/broken.wav"}


def test_nothing_to_embed(layer_norm_checkpoint, audio_folder):
    assert len(embed(load_encoder(layer_norm_checkpoint), open_rows(str(audio_folder(1, seconds=0.05))))) == 0


def test_random_weights_are_others(layer_norm_checkpoint, audio_folder):
    rows = open_rows(str(audio_folder(1)))
    torch.manual_seed(3)
    random = embed(load_encoder(layer_norm_checkpoint, random_weights=True), rows).values
    assert random.shape == (1, 3, 64)
    assert np.abs(random - embed(load_encoder(layer_norm_checkpoint), rows).values).max() > 0.01

"""The mel front end against torchaudio's transforms, and on what would break it: padding, silence, half precision."""

import pytest
import torch
import torchaudio

from acoustic.models.features import MelConfig, MelFeatures


def make_audio(batch=2, samples=12_345):
    """Chirps in noise, each louder than the one before."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(samples) / 16_000
    loudness = 10.0 ** torch.arange(-3, batch - 3)[:, None]
    chirps = torch.sin(2 * torch.pi * (300 + 900 * time * torch.arange(1, batch + 1)[:, None]) * time)
    return loudness * (chirps + 0.1 * torch.randn(batch, samples, generator=generator))


def by_torchaudio(audio, rate, window, hop, bands, orders):
    """(frames, mel and deltas), (frames, frequencies) of one waveform, by the definition."""
    audio = audio * 10 ** (-25 / 20) / audio.square().mean().sqrt()
    options = {"n_fft": window, "hop_length": hop, "center": False}
    mel = torchaudio.transforms.MelSpectrogram(rate, **options, n_mels=bands, power=2.0)(audio)
    parts = [torch.log(mel + 1e-10)]
    for _ in range(orders):
        parts.append(torchaudio.transforms.ComputeDeltas()(parts[-1]))
    linear = torch.log(torchaudio.transforms.Spectrogram(**options, power=2.0)(audio) + 1e-10)
    features = torch.cat(parts)
    both = (features, linear)
    return [((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)).T for x in both]


@pytest.mark.parametrize(
    ("rate", "window_ms", "hop_ms", "bands", "orders"),
    [(16_000, 25, 10, 80, 2), (16_000, 25, 10, 80, 0), (8000, 32, 12.5, 40, 1), (44_100, 20, 10, 64, 2)],
)
def test_equals_torchaudio(rate, window_ms, hop_ms, bands, orders):
    config = MelConfig(sampling_rate=rate, window_ms=window_ms, hop_ms=hop_ms, num_mel_bands=bands, num_deltas=orders)
    audio = make_audio()
    mel, linear = MelFeatures(config)(audio, linear=True)
    assert mel.shape[2] == config.feature_size and linear.shape[2] == config.linear_size
    for row in range(len(audio)):
        window, hop = round(rate * window_ms / 1000), round(rate * hop_ms / 1000)
        expected = by_torchaudio(audio[row], rate, window, hop, bands, orders)
        torch.testing.assert_close(mel[row], expected[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(linear[row], expected[1], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("stacking", [1, 3])
def test_padding_changes_nothing(stacking):
    features = MelFeatures(MelConfig(num_deltas=2, frame_stacking=stacking))
    audio, lengths = make_audio(4, 12_000), [12_000, 7000, 999, 5680]
    mask = (torch.arange(12_000) < torch.tensor(lengths)[:, None]).long()
    padded, linear = features(audio + (1 - mask) * 5, mask, linear=True)  # whatever the padding is
    for row, length in enumerate(lengths):
        frames = features.output_lengths(length)
        alone = features(audio[row : row + 1, :length], linear=True)
        for together, single in zip((padded, linear), alone):
            assert single.shape[1] == frames
            torch.testing.assert_close(together[row, :frames], single[0], rtol=1e-4, atol=1e-4)
            assert not together[row, frames + 1 :].any()  # a stack may have one frame of the row's end


def test_a_row_shorter_than_a_frame_is_silent_not_nan():
    mask = (torch.arange(4000) < torch.tensor([[4000], [50]])).long()
    mel, linear = MelFeatures(MelConfig(num_deltas=2))(make_audio(2, 4000), mask, linear=True)
    assert mel.isfinite().all() and linear.isfinite().all()
    assert not mel[1].any()


@pytest.mark.parametrize("stacking", [1, 3])
def test_lengths_are_those_of_the_frames(stacking):
    features = MelFeatures(MelConfig(frame_stacking=stacking))
    for samples in (*range(720, 1700, 33), 16_000, 48_123):
        assert features.output_lengths(samples) == features(torch.randn(1, samples))[0].shape[1]
    lengths = torch.tensor([0, 399, 400, 559, 560, 1040, 48_123])
    assert features.output_lengths(lengths).tolist() == [features.output_lengths(int(n)) for n in lengths]
    assert features.output_lengths(0) == features.output_lengths(399) == 0


def test_normalised_whatever_the_loudness():
    features, audio = MelFeatures(MelConfig(num_deltas=2)), make_audio()
    mel, _ = features(audio)
    assert mel.mean(1).abs().max() < 1e-4
    torch.testing.assert_close(mel.std(1, correction=0), torch.ones(2, 240), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(features(audio * 1e-5)[0], mel, rtol=1e-3, atol=1e-3)
    assert features(audio * 1e-15)[0].isfinite().all()


def test_silence_and_steady_sounds_become_zeros():
    features = MelFeatures(MelConfig(num_deltas=2))
    assert not features(torch.zeros(1, 8000), linear=True)[0].any()
    steady = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000, dtype=torch.float64) / 16_000).float()[None]
    mel, _ = features(steady)  # ten periods in a hop: all frames are the same but for rounding
    # Near the floor of the logarithm rounding is large; where the sound is, a constant must not become noise.
    loud = mel[0, :, :80][:, features.filterbank[25] > 0]
    assert loud.numel() and loud.abs().max() < 0.1
    half_silent = torch.cat([make_audio(1, 8000), torch.zeros(1, 8000)], dim=1)
    assert features(half_silent)[0].isfinite().all()


def test_float32_under_autocast_and_without_gradients():
    features, audio = MelFeatures(MelConfig(num_deltas=2)), make_audio().requires_grad_()
    expected, _ = features(audio)
    with torch.autocast("cpu", torch.bfloat16):
        mel, _ = features(audio)
    assert mel.dtype == torch.float32 and torch.equal(mel, expected)
    assert not mel.requires_grad and not list(features.parameters())
    assert not features.state_dict()
    assert torch.equal(features.half()(audio)[0], expected)  # half precision is for weights


def test_stacked_frames_lie_side_by_side():
    audio = make_audio()
    single, _ = MelFeatures(MelConfig(num_deltas=1))(audio)
    config = MelConfig(num_deltas=1, frame_stacking=3)
    stacked, _ = MelFeatures(config)(audio)
    assert (config.feature_size, config.inputs_to_logits_ratio) == (480, 480)
    assert stacked.shape == (2, single.shape[1] // 3, 480)
    assert torch.equal(stacked[:, 5], single[:, 15:18].flatten(1))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sampling_rate": 22_050}, "hop_ms 10 is 220.5 samples|window_ms 25 is 551.25 samples"),
        ({"sampling_rate": 44_100}, "window_ms 25 is 1102.5 samples at 44100 Hz, not a whole number"),
        ({"sampling_rate": 8000}, "num_mel_bands 80 are too many .* at 8000 Hz: .* take 67 or fewer"),
        ({"num_mel_bands": 200}, "num_mel_bands 200 are too many"),
        ({"hop_ms": 0}, "hop_ms 0 is 0 samples"),
        ({"frame_stacking": 0}, "frame_stacking must be a whole number from 1, not 0"),
        ({"num_deltas": -1}, "num_deltas must be a whole number from 0"),
        ({"sampling_rate": 16_000.5}, "sampling_rate must be a whole number"),
    ],
)
def test_what_it_cannot_take(values, words):
    with pytest.raises(ValueError, match=words) as error:
        MelConfig(**values)
    assert "\n" not in str(error.value)


def test_too_short_for_a_frame():
    with pytest.raises(ValueError, match="399 samples are too few for a frame, which takes 400"):
        MelFeatures(MelConfig())(torch.zeros(1, 399))
    with pytest.raises(ValueError, match="which takes 720"):
        MelFeatures(MelConfig(frame_stacking=3))(torch.zeros(1, 719))


def test_the_number_of_bands_it_names_is_the_largest_that_fits():
    with pytest.raises(ValueError) as error:
        MelConfig(sampling_rate=8000)
    most = int(str(error.value).split("take ")[1].split()[0])
    MelConfig(sampling_rate=8000, num_mel_bands=most)
    with pytest.raises(ValueError, match="too many"):
        MelConfig(sampling_rate=8000, num_mel_bands=most + 1)

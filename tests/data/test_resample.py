"""The same numbers as torchaudio's resampling, at any rate."""

import numpy as np
import pytest
import torch
import torchaudio

from acoustic.data.resample import Resampler, resample, resampler, small_ratio


@pytest.mark.parametrize(
    "rate", [100, 8_000, 11_025, 11_127, 12_000, 16_001, 22_050, 24_000, 44_100, 44_101, 48_000, 192_000, 4_000_000]
)
def test_it_equals_torchaudio(rate):
    ratio = small_ratio(rate, 16_000)
    assert abs(float(ratio) / (rate / 16_000) - 1) < 5e-4 and max(ratio.numerator, ratio.denominator) <= 1_000
    ours, theirs = (kind(ratio.numerator, ratio.denominator) for kind in (Resampler, torchaudio.transforms.Resample))
    generator = np.random.default_rng(rate)
    for length in (1, 2, 7, 100, 999, rate // 3 + 5):
        waveform = generator.standard_normal(length).astype(np.float32)
        expected = theirs(torch.from_numpy(waveform)).numpy()
        np.testing.assert_allclose(ours(waveform), expected, atol=2e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 44_101, 15_999])
@pytest.mark.parametrize("frames", [1, 1_001, 50_000])
def test_the_length_is_that_of_the_exact_ratio(rate, frames):
    waveform = np.ones(frames, np.float32)
    assert len(resample(waveform, rate, 16_000)) == -(-frames * 16_000 // rate)


def test_the_same_rate_is_left_alone():
    waveform = np.arange(5, dtype=np.float32)
    assert resample(waveform, 16_000, 16_000) is waveform


def test_a_kernel_is_made_once():
    resampler.cache_clear()
    for _ in range(3):
        resample(np.ones(100, np.float32), 8_000, 16_000)
    assert resampler.cache_info().misses == 1


def test_a_kernel_of_rates_without_a_common_divisor_is_small():
    assert sum(kernel.numel() for *_, kernel in Resampler(44_101, 16_000).products) < 4e6

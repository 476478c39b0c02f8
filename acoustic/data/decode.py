"""Read one window of one recording: seek, read, downmix, resample. Nothing outside the window is decoded."""

from fractions import Fraction
from functools import lru_cache

import numpy as np
import soundfile
import torch
import torchaudio

from acoustic.data.headers import Skip, open_audio

# Containers whose decoders need some past before they are exact: mp3's bit reservoir, Opus' filters; and in the last
# page of an Ogg file libsndfile 1.2 seeks to a wrong place. Decoding 2 s takes milliseconds.
LOSSY, PREROLL_SECONDS = ("OGG", "MP3"), 2.0


@lru_cache(maxsize=64)
def resampler(from_rate: int, to_rate: int) -> torchaudio.transforms.Resample:
    """The windowed-sinc kernel costs more to make than to apply to one window, so each pair of rates makes it once.

    The kernel grows with the product of the rates over their common divisor: gigabytes at 44,101 Hz. So a ratio that
    has no small terms is rounded to one that has, less than 0.02 % away.
    """
    ratio = Fraction(from_rate, to_rate).limit_denominator(1000)
    return torchaudio.transforms.Resample(ratio.numerator, ratio.denominator)


def read_window(audio: dict, start: int, stop: int, rate: int) -> np.ndarray:
    """Samples [start, stop) of a recording, counted at its own rate, as mono float32 at `rate` Hz.

    Args:
        audio: an undecoded `{"path", "bytes"}` value.
        start, stop: window in frames of the source.
        rate: the model's sample rate in Hz.

    Returns:
        (samples,) float32, with ceil((stop - start) * rate / source rate) samples (see `resampler` for odd rates).

    Raises:
        Skip: the window is truncated, unreadable or holds NaN or infinity.
    """
    with open_audio(audio) as file:
        source_rate = file.samplerate
        first = max(start - int(PREROLL_SECONDS * source_rate), 0) if file.format in LOSSY else start
        try:
            file.seek(first)
            frames = file.read(stop - first, dtype="float32", always_2d=True)[start - first :]
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise Skip(f"decoding failed: {str(error).rsplit(': ', 1)[-1]}") from None
    if len(frames) < stop - start:
        raise Skip(f"truncated: {start + len(frames)} of {stop} frames could be read")
    waveform = frames[:, 0] if frames.shape[1] == 1 else frames.mean(axis=1)
    if not np.isfinite(waveform).all():
        raise Skip("NaN or infinite samples")
    if source_rate != rate:
        waveform = resampler(source_rate, rate)(torch.from_numpy(np.ascontiguousarray(waveform))).numpy()
    return waveform

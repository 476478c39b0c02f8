"""Read one window of one recording: seek, read, downmix, resample. Nothing outside the window is decoded."""

import numpy as np
import soundfile

from acoustic.data.headers import Silent, Skip, open_audio
from acoustic.data.resample import resample

# Some decoders need some past before they are exact. mp3: its bit reservoir, a few frames of at most 1152 samples.
# Ogg: Opus' filters; and in the last page of a file libsndfile 1.2 seeks to a wrong place.
MP3_PREROLL_FRAMES, OGG_PREROLL_SECONDS = 16 * 1152, 2.0

# Samples over all channels that are held at a time: what 256 channels hold would be 64 windows.
MAX_SAMPLES = 2**21

# -100 dBFS from top to bottom: under the noise of any recorder, over the rounding of lossy codecs.
SILENCE = 1e-5


def read_window(audio: dict, start: int, stop: int, rate: int, refuse_silence: bool = False) -> np.ndarray:
    """Samples [start, stop) of a recording, counted at its own rate, as mono float32 at `rate` Hz.

    Args:
        audio: an undecoded audio value, see `open_audio`.
        start, stop: window in frames of the source.
        rate: the model's sample rate in Hz.
        refuse_silence: nothing to be heard is a fault: without a label it teaches nothing.

    Returns:
        (samples,) float32, with ceil((stop - start) * rate / source rate) samples.

    Raises:
        Skip: the window is truncated, unreadable, silent, or holds NaN or infinity.
    """
    with open_audio(audio) as file:
        source_rate = file.samplerate
        first = max(start - preroll(file), 0)
        go_to(file, first)
        waveform = read_mono(file, stop - first)[start - first :]
    if len(waveform) < stop - start:
        raise Skip(f"truncated: {start + len(waveform)} of {stop} frames could be read")
    if not np.isfinite(waveform).all():
        raise Skip("NaN or infinite samples")
    if refuse_silence and is_silent(waveform):
        raise Silent("silent")
    return resample(waveform, source_rate, rate)


def preroll(file) -> int:
    """Frames to decode before a window, and to drop."""
    if file.format == "MP3":
        return MP3_PREROLL_FRAMES
    return int(OGG_PREROLL_SECONDS * file.samplerate) if file.format == "OGG" else 0


def go_to(file, frame: int) -> None:
    """Telephony codecs that can't seek (GSM 6.10, G.721) are decoded from the start, and that is dropped."""
    if not isinstance(file, soundfile.SoundFile) or file.seekable():
        file.seek(frame)
        return
    while frame > 0:
        dropped = len(file.read(min(frame, max(MAX_SAMPLES // file.channels, 1)), dtype="float32"))
        frame = frame - dropped if dropped else 0


def read_mono(file, frames: int) -> np.ndarray:
    """The mean over channels of the next `frames` frames, or of fewer at the file's end."""
    pieces, most = [], max(MAX_SAMPLES // file.channels, 1)
    # A matrix product; `mean` over so short an axis takes longer than decoding an mp3.
    share = np.full(file.channels, 1 / file.channels, np.float32)
    while frames > 0:
        piece = file.read(min(frames, most), dtype="float32", always_2d=True)
        pieces.append(piece[:, 0] if file.channels == 1 else piece @ share)
        frames = frames - len(piece) if len(piece) else 0
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.zeros(0, np.float32)])


def is_silent(waveform: np.ndarray) -> bool:
    """Whether nothing is to be heard, however loud it is played: zeros, or a constant."""
    return float(np.ptp(waveform)) <= SILENCE

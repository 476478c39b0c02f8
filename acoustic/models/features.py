"""The mel front end: normalised log-mel frames of a waveform, with deltas, and its log-linear spectrum."""

import warnings
from functools import lru_cache

import torch
from torch import nn
from torchaudio.functional import melscale_fbanks
from transformers import initialization as init

from acoustic.models.heads import EncoderConfig

LEVEL_DB = -25.0  # RMS that every waveform is brought to
LOG_FLOOR = 1e-10  # added to a power before its logarithm
# Of a logarithm over time. A band that is constant but for rounding (3e-6 at the floor's -23) becomes 0, not noise.
LEAST_DEVIATION = 1e-3
TARGETS = ("input", "linear")


class MelConfig(EncoderConfig):
    """What the configs of systems on mel frames share; defaults are those of S3PRL's front end.

    Args:
        sampling_rate: of the waveform, in Hz.
        window_ms, hop_ms: of the Hann window; each a whole number of samples at that rate.
        num_mel_bands: from 0 Hz to half the rate.
        num_deltas: how many orders of differences over time stand beside the mel bands (2: delta and delta-delta).
        frame_stacking: so many frames side by side become one (Liu 2019, section 2.1: 3).
    """

    sampling_rate: int = 16_000
    window_ms: float | int = 25
    hop_ms: float | int = 10
    num_mel_bands: int = 80
    num_deltas: int = 0
    frame_stacking: int = 1

    def __post_init__(self, **kwargs):
        for name, least in (("sampling_rate", 1), ("num_mel_bands", 1), ("num_deltas", 0), ("frame_stacking", 1)):
            check_whole(name, getattr(self, name), least)
        for name in ("window_ms", "hop_ms"):
            whole_samples(name, getattr(self, name), self.sampling_rate)
        check_bands(self.num_mel_bands, self.window, self.sampling_rate)
        super().__post_init__(**kwargs)

    @property
    def window(self) -> int:
        """Samples."""
        return whole_samples("window_ms", self.window_ms, self.sampling_rate)

    @property
    def hop(self) -> int:
        """Samples from one spectrum to the next."""
        return whole_samples("hop_ms", self.hop_ms, self.sampling_rate)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples from one frame of the model to the next."""
        return self.hop * self.frame_stacking

    @property
    def feature_size(self) -> int:
        """Values of a frame of the model."""
        return self.num_mel_bands * (1 + self.num_deltas) * self.frame_stacking

    @property
    def linear_size(self) -> int:
        """Values of a frame of the log-linear spectrum."""
        return (self.window // 2 + 1) * self.frame_stacking


def check_whole(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number from {least}, not {value!r}")


def whole_samples(name: str, milliseconds: float, rate: int) -> int:
    samples = milliseconds * rate / 1000
    if samples < 1 or abs(samples - round(samples)) > 1e-6:
        raise ValueError(
            f"{name} {milliseconds:g} is {samples:g} samples at {rate} Hz, not a whole number; take another {name}, "
            "or a sampling_rate of 16000, to which audio is resampled"
        )
    return round(samples)


def check_bands(bands: int, window: int, rate: int) -> None:
    """Raises ValueError where a band lies between two frequencies of the spectrum."""
    if has_empty_band(bands, window, rate):
        most = bands - 1
        while most > 1 and has_empty_band(most, window, rate):
            most -= 1
        raise ValueError(
            f"num_mel_bands {bands} are too many for a window of {1000 * window / rate:g} ms at {rate} Hz: some would "
            f"be empty; take {most} or fewer, or a longer window_ms"
        )


def has_empty_band(bands: int, window: int, rate: int) -> bool:
    return not mel_filterbank(bands, window, rate).any(0).all()


@lru_cache(maxsize=256)
def mel_filterbank(bands: int, window: int, rate: int) -> torch.Tensor:
    """(frequencies, bands) float32 on the CPU: triangles on the HTK scale, each 1 at its centre, as in S3PRL."""
    # transformers builds a model on the meta device, and under the type that it is loaded in.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of empty bands, which `check_bands` says in words
            return melscale_fbanks(window // 2 + 1, 0.0, rate / 2, bands, rate)
    finally:
        torch.set_default_dtype(default)


class MelFeatures(nn.Module):
    """Waveform -> frames of mean 0 and variance 1 in each band over the utterance.

    A frame is a window that lies wholly within the waveform, nothing padded at its ends: there are
    (samples - window) // hop + 1, and each is the same whatever is padded behind it. (S3PRL centres its windows on
    multiples of the hop and reflects the ends: 3 frames more.) Always in float32 and without gradients: there are no
    parameters. Silence gives zeros.

    Args:
        config: a `MelConfig`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # No part of a checkpoint; `reset` fills them where transformers has loaded one.
        self.register_buffer("hann", torch.empty(config.window, dtype=torch.float32), persistent=False)
        shape = (config.window // 2 + 1, config.num_mel_bands)
        self.register_buffer("filterbank", torch.empty(shape, dtype=torch.float32), persistent=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """The constants, anew: for a model's `_init_weights`."""
        config = self.config
        init.copy_(self.hann, torch.hann_window(config.window, dtype=torch.float32, device=self.hann.device))
        if not self.filterbank.is_meta:
            init.copy_(self.filterbank, mel_filterbank(config.num_mel_bands, config.window, config.sampling_rate))

    def _apply(self, fn, recurse: bool = True):
        """Half precision is for weights: window and filterbank move, but keep their type."""
        super()._apply(fn, recurse)
        if self.hann.dtype != torch.float32:
            self.hann, self.filterbank = self.hann.float(), self.filterbank.float()
            self.reset()
        return self

    def output_lengths(self, samples, stacked: bool = True):
        """Frames of so many samples (int or tensor): of the model, or before they are stacked."""
        frames = (samples - self.config.window) // self.config.hop + 1
        frames = frames.clamp(min=0) if isinstance(frames, torch.Tensor) else max(frames, 0)
        return frames // self.config.frame_stacking if stacked else frames

    @torch.no_grad()
    def forward(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None, linear: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            input_values: (batch, samples) float32.
            attention_mask: (batch, samples), 0 where padded on the right; None where nothing is.
            linear: also the log-linear spectrum, normalised likewise.

        Returns:
            (batch, frames, feature_size) and (batch, frames, linear_size) or None; 0 where padded.
        """
        config = self.config
        if self.output_lengths(input_values.shape[1]) < 1:
            least = config.window + (config.frame_stacking - 1) * config.hop
            raise ValueError(f"{input_values.shape[1]} samples are too few for a frame, which takes {least}")
        lengths = None
        with torch.autocast(input_values.device.type, enabled=False):
            audio = input_values.float()
            if attention_mask is not None:
                audio = audio * attention_mask
                lengths = self.output_lengths(attention_mask.sum(-1), stacked=False)
            power = self.power(to_level(audio, attention_mask))
            mel = (power @ self.filterbank).add_(LOG_FLOOR).log_()
            mel = self.stack(normalize(with_deltas(mel, config.num_deltas, lengths), lengths))
            spectrum = self.stack(normalize(power.add_(LOG_FLOOR).log_(), lengths)) if linear else None
        return mel, spectrum

    def power(self, audio: torch.Tensor) -> torch.Tensor:
        """(batch, samples) -> (batch, frames, frequencies)."""
        spectra = torch.fft.rfft(audio.unfold(1, self.config.window, self.config.hop) * self.hann)
        return spectra.real.square().add_(spectra.imag.square())

    def stack(self, frames: torch.Tensor) -> torch.Tensor:
        """So many frames side by side; those left over at the end go."""
        count = self.config.frame_stacking
        if count == 1:
            return frames
        whole = frames.shape[1] // count
        return frames[:, : whole * count].reshape(len(frames), whole, -1)


def to_level(audio: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Waveforms (batch, samples), 0 where padded, at `LEVEL_DB` RMS over their true lengths; silence stays silence."""
    samples = audio.shape[1] if attention_mask is None else attention_mask.sum(-1, keepdim=True)
    rms = torch.linalg.vector_norm(audio, dim=1, keepdim=True) / samples**0.5
    return audio * (10 ** (LEVEL_DB / 20) / rms.clamp_min(1e-20))


def with_deltas(frames: torch.Tensor, orders: int, lengths: torch.Tensor | None) -> torch.Tensor:
    """(batch, frames, bands) -> (batch, frames, bands * (1 + orders)): slopes over 5 frames, and the slopes of these.

    As torchaudio's `compute_deltas`, with the ends repeated; of a padded row its true end. (That one's convolution is
    done in TF32 on a GPU, which is coarse for differences.)
    """
    parts = [frames]
    for _ in range(orders):
        last = parts[-1]
        index = (
            torch.arange(-2, last.shape[1] + 2, device=last.device).clamp(0, last.shape[1] - 1).expand(len(last), -1)
        )
        if lengths is not None:
            index = index.minimum((lengths - 1).clamp_min(0)[:, None])
        x = last.gather(1, index[..., None].expand(-1, -1, last.shape[2]))
        parts.append((2 * (x[:, 4:] - x[:, :-4]) + x[:, 3:-1] - x[:, 1:-3]) / 10)
    return torch.cat(parts, dim=-1)


def normalize(frames: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """(batch, frames, bands) to mean 0 and variance 1 over the first `lengths` frames of each row; 0 behind them."""
    if lengths is None:
        centred = frames - frames.mean(1, keepdim=True)
        deviation = centred.square().mean(1, keepdim=True).sqrt()
        return centred / deviation.clamp_min(LEAST_DEVIATION)
    real = (torch.arange(frames.shape[1], device=frames.device) < lengths[:, None])[..., None]
    count = lengths.clamp_min(1)[:, None, None]
    mean = frames.where(real, 0).sum(1, keepdim=True) / count
    centred = (frames - mean).where(real, 0)
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return centred / deviation.clamp_min(LEAST_DEVIATION)

"""Strided convolutions over the waveform, and causal ones over their frames: wav2vec, vq-wav2vec and CPC.

Inside, channels come before frames, where torch's 1-d convolutions are fastest on a CPU (as fast as matrix products of
the taps, measured). What goes in and comes out has frames before channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from acoustic.models.encoder import AudioEncoder
from acoustic.models.heads import EncoderConfig

NORMS = ("group", "channel", "none")
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class WaveConfig(EncoderConfig):
    """What the configs of systems on convolutions over the waveform share; defaults are wav2vec's.

    Args:
        conv_dim, conv_kernel, conv_stride: one value for each layer; strides multiply to the samples of a frame.
        conv_bias: whether these convs have one.
        feat_extract_norm: after each conv: "group", over channels and time together; "channel", over the channels at
            each time; "none".
        feat_extract_activation: "relu" or "gelu".
        log_compression: log(|x| + 1) of what the convs give.
    """

    hidden_size: int = 512
    conv_dim: list[int] | tuple[int, ...] = (512,) * 7
    conv_kernel: list[int] | tuple[int, ...] = (10, 8, 4, 4, 4, 1, 1)
    conv_stride: list[int] | tuple[int, ...] = (5, 4, 2, 2, 2, 1, 1)
    conv_bias: bool = False
    feat_extract_norm: str = "group"
    feat_extract_activation: str = "relu"
    log_compression: bool = True

    def __post_init__(self, **kwargs):
        for name in ("conv_dim", "conv_kernel", "conv_stride"):
            setattr(self, name, list(getattr(self, name)))
        check_at_least_1(self, "hidden_size", "conv_dim", "conv_kernel", "conv_stride")
        lengths = {len(self.conv_dim), len(self.conv_kernel), len(self.conv_stride)}
        if lengths == {0} or len(lengths) > 1:
            raise ValueError("conv_dim, conv_kernel and conv_stride need one value for each layer")
        check_choice(self, "feat_extract_norm", NORMS)
        check_choice(self, "feat_extract_activation", tuple(ACTIVATIONS))
        super().__post_init__(**kwargs)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.conv_stride)

    @property
    def receptive_field(self) -> int:
        """Samples that a frame sees."""
        return receptive_field(self.conv_kernel, self.conv_stride)

    @property
    def feature_size(self) -> int:
        return self.conv_dim[-1]


def check_at_least_1(config, *names: str) -> None:
    """Raises ValueError for a whole number, or one in a list, that is below 1."""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be at least 1 and a whole number, not {number!r}")


def check_choice(config, name: str, choices: tuple) -> None:
    if getattr(config, name) not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, not {getattr(config, name)!r}")


def receptive_field(kernels, strides) -> int:
    """Samples that one frame sees."""
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides)):
        samples = (samples - 1) * stride + kernel
    return samples


class WaveEncoder(nn.Module):
    """Waveform -> frames: conv, norm, activation for each layer, then log(|x| + 1) where asked for (Schneider 2019,
    arXiv 1904.05862, section 2.1; van den Oord 2018, arXiv 1807.03748, section 3.1).

    Group norms see all of a window, so a frame depends, by two numbers for each layer, on what comes after it, as in
    the published wav2vec. With norm "channel" or "none" it depends on its receptive field only.

    Args:
        config: a `WaveConfig`.
    """

    def __init__(self, config):
        super().__init__()
        norm, activation = config.feat_extract_norm, config.feat_extract_activation
        self.kernels, self.strides = list(config.conv_kernel), list(config.conv_stride)
        self.log_compression = config.log_compression
        self.layers = nn.ModuleList()
        in_dim = 1
        for dim, kernel, stride in zip(config.conv_dim, self.kernels, self.strides):
            self.layers.append(ConvLayer(in_dim, dim, kernel, stride, norm, activation, config.conv_bias))
            in_dim = dim

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            input_values: (batch, samples) float32.
            attention_mask: (batch, samples), 0 where padded on the right; None where nothing is.

        Returns:
            (batch, frames, channels); 0 where padded.
        """
        if self.output_lengths(input_values.shape[1]) < 1:
            raise ValueError(f"{input_values.shape[1]} samples are too few for a frame")
        lengths = None if attention_mask is None else attention_mask.sum(-1)
        hidden, real = input_values[:, None], None
        for layer, kernel, stride in zip(self.layers, self.kernels, self.strides):
            if lengths is not None:
                lengths = frames_after(lengths, kernel, stride)
                real = mask_of_lengths(lengths, frames_after(hidden.shape[2], kernel, stride))
            hidden = layer(hidden, real)
        if self.log_compression:
            hidden = hidden.abs().log1p()
        if real is not None:
            hidden = hidden * real[:, None]
        return hidden.transpose(1, 2)

    def output_lengths(self, samples):
        """Frames of so many samples: an int, or a tensor of them."""
        for kernel, stride in zip(self.kernels, self.strides):
            samples = frames_after(samples, kernel, stride)
        return samples

    def frame_mask(self, frames: int, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch, samples) -> (batch, frames) bool: the frames that see no padding."""
        return mask_of_lengths(self.output_lengths(attention_mask.sum(-1)), frames)


class ConvLayer(nn.Module):
    """(batch, channels, frames) -> the same with other sizes; `real` (batch, frames) bool of its output."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int, norm: str, activation: str, bias: bool):
        super().__init__()
        self.conv = nn.Conv1d(in_dim, dim, kernel, stride, bias=bias)
        self.norm = make_norm(norm, dim)
        self.activation = make_activation(activation)

    def forward(self, hidden: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.conv(hidden)
        if self.norm is not None:
            hidden = self.norm(hidden, real)
        return self.activation(hidden)


class ConvContext(nn.Module):
    """Causal convolutions over frames (Schneider 2019, section 2.1): before each, the first frame is repeated.

    conv, norm, activation, then (x + residual) * sqrt(.5); where the width changes the residual goes through a 1x1
    conv. The convs never see a later frame. Its group norms do, as in the published model: their mean and variance
    are over the whole window, so a frame depends on later ones by two numbers for each layer. With norm "channel"
    nothing comes from later frames.

    Args:
        in_dim, dim: widths of what goes in, and of every layer.
        kernels: one for each layer.
    """

    def __init__(self, in_dim: int, dim: int, kernels, norm: str = "group", activation: str = "relu", bias=True):
        super().__init__()
        self.layers = nn.ModuleList(
            ConvLayer(dim if index else in_dim, dim, kernel, 1, norm, activation, bias)
            for index, kernel in enumerate(kernels)
        )
        self.residual = nn.Conv1d(in_dim, dim, 1, bias=False) if in_dim != dim else None

    def forward(self, features: torch.Tensor, frame_mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        """
        Args:
            features: (batch, frames, in_dim).
            frame_mask: (batch, frames) bool, False for padding on the right; None where there is none.

        Returns:
            (batch, frames, dim) of each layer.
        """
        hidden, outputs = features.transpose(1, 2), []
        for index, layer in enumerate(self.layers):
            residual = self.residual(hidden) if index == 0 and self.residual is not None else hidden
            before = layer.conv.kernel_size[0] - 1
            hidden = layer(F.pad(hidden, (before, 0), mode="replicate"), frame_mask)
            hidden = (hidden + residual) * math.sqrt(0.5)
            outputs.append(hidden.transpose(1, 2))
        return outputs


class ConvContextEncoder(AudioEncoder):
    """Of a model that has an `encoder`, the convs over the waveform, and a `context`, a `ConvContext`."""

    def contextualize(
        self, features: torch.Tensor, frame_mask: torch.Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutput:
        """The features count among the hidden states where they are as wide as the context."""
        outputs, states = self.context(features, frame_mask), None
        if output_hidden_states:
            fits = self.config.feature_size == self.config.hidden_size
            states = (features, *outputs) if fits else tuple(outputs)
        return BaseModelOutput(outputs[-1], states)

    def compile_regions(self, **options) -> None:
        self.encoder.compile(**options)
        self.context.compile(**options)


class GroupNorm(nn.GroupNorm):
    """One group: over all channels and times of a window, in float32; padding is left out of mean and variance."""

    def __init__(self, dim: int):
        super().__init__(1, dim)

    def forward(self, x: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
        """x: (batch, channels, frames); real: (batch, frames) bool, None where all are."""
        with torch.autocast(x.device.type, enabled=False):
            if real is None:
                # torch computes mean and variance of half types in float32.
                return F.group_norm(x, 1, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
            real, x32 = real[:, None], x.float()
            count = (real.sum((1, 2), keepdim=True) * x.shape[1]).clamp(min=1)
            mean = (x32 * real).sum((1, 2), keepdim=True) / count
            variance = ((x32 - mean) * real).square().sum((1, 2), keepdim=True) / count
            normed = (x32 - mean) * (variance + self.eps).rsqrt()
            return (normed * self.weight[:, None] + self.bias[:, None]).to(x.dtype)


class ChannelNorm(nn.Module):
    """Over the channels at each time (Riviere 2020, arXiv 2002.02848, section 3.1), in float32."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
        """x: (batch, channels, frames); each time by itself, so padding doesn't matter."""
        frames = x.transpose(1, 2).contiguous()
        with torch.autocast(x.device.type, enabled=False):
            affine = self.weight.to(x.dtype), self.bias.to(x.dtype)
            normed = F.layer_norm(frames, self.weight.shape, *affine, self.eps)
        # Copied back at once: the activation and its gradient are slow on what lies transposed in memory.
        return normed.transpose(1, 2).contiguous()


def make_norm(name: str, dim: int) -> nn.Module | None:
    return {"group": GroupNorm, "channel": ChannelNorm}[name](dim) if name != "none" else None


def make_activation(name: str) -> nn.Module:
    # Neither a norm nor a conv keeps its output for the backward pass.
    return nn.ReLU(inplace=True) if name == "relu" else ACTIVATIONS[name]()


def frames_after(length, kernel: int, stride: int):
    """Of a convolution: an int, or a tensor of them; 0 where the input is too short."""
    frames = (length - kernel) // stride + 1
    return frames.clamp(min=0) if isinstance(frames, torch.Tensor) else max(frames, 0)


def mask_of_lengths(lengths: torch.Tensor, frames: int) -> torch.Tensor:
    """(batch,) -> (batch, frames) bool: the first `length` of each row."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def init_wave_weights(module: nn.Module) -> None:
    """For an `_init_weights`: convs keep the variance of what goes through them (He 2015), norms start neutral."""
    if isinstance(module, nn.Conv1d):
        init.kaiming_normal_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, (GroupNorm, ChannelNorm)):
        init.ones_(module.weight)
        init.zeros_(module.bias)

"""Convolutions over the waveform and over frames: sizes, padding, what a frame sees, against naive loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from acoustic.models import wave_encoder
from acoustic.models.wave_encoder import ConvContext, WaveConfig, WaveEncoder, init_wave_weights

SMALL = {"conv_dim": [12, 16, 20], "conv_kernel": [20, 8, 4], "conv_stride": [10, 4, 4]}  # 160 samples a frame


def make_encoder(**changed):
    torch.manual_seed(0)
    encoder = WaveEncoder(WaveConfig(**{**SMALL, **changed}))
    return randomize(encoder)


def make_context(norm="group", in_dim=8, dim=8, kernels=(2, 3, 4)):
    torch.manual_seed(0)
    return randomize(ConvContext(in_dim, dim, kernels, norm))


def randomize(module):
    """Weights as in training: norms and biases that aren't neutral."""
    module.apply(init_wave_weights)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def naive_norm(x, norm, name, eps=1e-5):
    """x: (channels, frames) of one window."""
    if name == "none":
        return x
    axes = (0, 1) if name == "group" else 0
    mean, variance = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * norm.weight[:, None] + norm.bias[:, None]


def naive_conv(x, conv):
    """(channels, frames), frame by frame."""
    (kernel,), (stride,) = conv.kernel_size, conv.stride
    starts = range(0, x.shape[1] - kernel + 1, stride)
    frames = [(conv.weight * x[:, start : start + kernel]).sum((1, 2)) for start in starts]
    return torch.stack(frames, dim=1) + (0 if conv.bias is None else conv.bias[:, None])


@pytest.mark.parametrize("norm", wave_encoder.NORMS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_equals_a_loop_over_windows_and_frames(norm, activation):
    bias = norm == "none"
    encoder = make_encoder(feat_extract_norm=norm, feat_extract_activation=activation, conv_bias=bias)
    audio = torch.randn(2, 1500)
    for row, window in zip(encoder(audio), audio):
        x = window[None]
        for layer in encoder.layers:
            x = getattr(F, activation)(naive_norm(naive_conv(x, layer.conv), layer.norm, norm))
        torch.testing.assert_close(row, torch.log(x.abs() + 1).T, rtol=1e-4, atol=1e-5)


def test_without_compression_nothing_is_compressed():
    audio = torch.randn(1, 2000)
    plain, compressed = (make_encoder(log_compression=on)(audio) for on in (False, True))
    torch.testing.assert_close(compressed, torch.log1p(plain.abs()))


@pytest.mark.parametrize("norm", wave_encoder.NORMS)
def test_context_equals_a_loop_over_windows_and_frames(norm):
    """With another width before it, so with its projection of the residual."""
    context = make_context(norm, in_dim=6)
    features = torch.randn(2, 9, 6)
    outputs = context(features)
    for row, window in enumerate(features):
        x = window.T
        for index, layer in enumerate(context.layers):
            residual = context.residual.weight[:, :, 0] @ x if index == 0 else x
            before = x[:, :1].repeat(1, layer.conv.kernel_size[0] - 1)
            x = F.relu(naive_norm(naive_conv(torch.cat([before, x], dim=1), layer.conv), layer.norm, norm))
            x = (x + residual) * math.sqrt(0.5)
            torch.testing.assert_close(outputs[index][row], x.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples", [234, 235, 1000, 1001, 16000])
def test_lengths_are_those_that_come_out(samples):
    encoder = make_encoder()
    frames = encoder.output_lengths(samples)
    assert encoder.output_lengths(torch.tensor([samples])).tolist() == [frames]
    if frames:
        assert encoder(torch.randn(1, samples)).shape == (1, frames, 20)
    else:
        with pytest.raises(ValueError, match=f"{samples} samples are too few"):
            encoder(torch.randn(1, samples))


def test_the_receptive_field_of_the_papers_convs():
    config = WaveConfig()
    assert (config.receptive_field, config.inputs_to_logits_ratio) == (465, 160)
    encoder = make_encoder(feat_extract_norm="none")
    field = WaveConfig(**SMALL).receptive_field
    assert (encoder.output_lengths(field - 1), encoder.output_lengths(field)) == (0, 1)


@pytest.mark.parametrize("norm", wave_encoder.NORMS)
def test_a_padded_clip_equals_itself_alone(norm):
    """Whatever is in the padding; a group norm over it would change everything."""
    encoder, context = make_encoder(feat_extract_norm=norm), make_context(norm, in_dim=20)
    audio, lengths = torch.randn(3, 4000), [4000, 1333, 2600]
    attention_mask = (torch.arange(4000) < torch.tensor(lengths)[:, None]).long()
    features = encoder(audio, attention_mask)
    real = encoder.frame_mask(features.shape[1], attention_mask)
    assert real.sum(1).tolist() == [encoder.output_lengths(length) for length in lengths]
    assert not features[~real].any()
    outputs = context(features + 3 * ~real[..., None], real)
    for row, length in enumerate(lengths):
        alone = encoder(audio[row : row + 1, :length])
        torch.testing.assert_close(features[row, real[row]], alone[0], rtol=1e-4, atol=1e-5)
        for layer, alone_layer in zip(outputs, context(alone)):
            torch.testing.assert_close(layer[row, real[row]], alone_layer[0], rtol=1e-4, atol=1e-5)


def test_a_clip_too_short_for_a_frame_is_no_nan_in_a_batch():
    encoder = make_encoder()
    attention_mask = (torch.arange(2000) < torch.tensor([[2000], [50]])).long()
    features = encoder(torch.randn(2, 2000), attention_mask)
    features.sum().backward()
    assert features.isfinite().all() and not features[1].any()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


def frames_seen(module, x, frame, output):
    """Which places of x have a gradient from that frame of the output."""
    x = x.clone().requires_grad_()
    output(module(x))[0, frame].sum().backward()
    return x.grad[0].reshape(x.shape[1], -1).abs().sum(1) > 0


def detached_norm(self, x, real=None):
    mean, variance = x.mean((1, 2), keepdim=True).detach(), x.var((1, 2), correction=0, keepdim=True).detach()
    return (x - mean) * (variance + self.eps).rsqrt() * self.weight[:, None] + self.bias[:, None]


@pytest.mark.parametrize("norm", ["none", "channel", "group, statistics aside"])
def test_the_context_does_not_see_the_future(norm, monkeypatch):
    monkeypatch.setattr(wave_encoder.GroupNorm, "forward", detached_norm)
    context = make_context(norm.split(",")[0], kernels=(2, 3, 4))
    seen = frames_seen(context, torch.randn(1, 20, 8), 12, lambda outputs: outputs[-1])
    # One, two and three frames before.
    assert seen.nonzero().flatten().tolist() == list(range(12 - 6, 13))


def test_the_statistics_of_a_group_norm_do_see_the_future():
    """A fact of the published model, said in the docstrings."""
    context = make_context("group")
    assert frames_seen(context, torch.randn(1, 20, 8), 12, lambda outputs: outputs[-1]).all()
    encoder = make_encoder()
    assert frames_seen(encoder, torch.randn(1, 2000), 2, lambda output: output).all()


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_a_frame_sees_its_receptive_field(norm):
    encoder, field = make_encoder(feat_extract_norm=norm), WaveConfig(**SMALL).receptive_field
    # GELU, for behind a ReLU some samples have no gradient by chance.
    for layer in encoder.layers:
        layer.activation = torch.nn.GELU()
    seen = frames_seen(encoder, torch.randn(1, 2000), 3, lambda output: output)
    assert seen.nonzero().flatten().tolist() == list(range(3 * 160, 3 * 160 + field))


def test_half_precision_norms_in_float32():
    """Low frames on a large mean: in half precision the variance would be lost."""
    for norm in (wave_encoder.GroupNorm(16), wave_encoder.ChannelNorm(16)):
        x = 1000 + 8 * torch.randn(2, 16, 50).round()
        half = norm(x.to(torch.bfloat16))
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), norm(x.to(torch.bfloat16).float()), rtol=0.01, atol=0.02)
        real = torch.ones(2, 50, dtype=torch.bool)
        torch.testing.assert_close(norm(x, real), norm(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"conv_dim": [8, 8]}, "one value for each layer"),
        ({"conv_dim": [], "conv_kernel": [], "conv_stride": []}, "one value for each layer"),
        ({"conv_stride": [5, 4, 0]}, "conv_stride must be at least 1"),
        ({"conv_kernel": [5, 4, 2.5]}, "conv_kernel must be at least 1 and a whole number, not 2.5"),
        ({"feat_extract_norm": "layer"}, "feat_extract_norm must be one of group, channel, none"),
        ({"feat_extract_activation": "selu"}, "feat_extract_activation must be one of relu, gelu"),
    ],
)
def test_impossible_values_are_one_line(values, words):
    with pytest.raises(ValueError, match=words) as caught:
        WaveConfig(**{**SMALL, **values})
    assert "\n" not in str(caught.value)

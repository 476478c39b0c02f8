"""The convolutions as matrix products, against transformers' modules and against torch's own convolution."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from transformers import Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

from acoustic.models import conv_encoder
from acoustic.models.conv_encoder import (
    encode_audio,
    multiply_first,
    multiply_taps,
    multiply_taps_backward,
    output_statistics,
)

SHAPES = {
    "wav2vec2": {},
    "three layers": {"conv_dim": (12, 16, 8), "conv_kernel": (40, 16, 4), "conv_stride": (20, 8, 2)},
    "kernels longer than twice the stride": {
        "conv_dim": (8, 8, 8),
        "conv_kernel": (9, 7, 5),
        "conv_stride": (4, 2, 2),
    },
    "kernels shorter than the stride": {"conv_dim": (8, 8, 8), "conv_kernel": (10, 2, 1), "conv_stride": (5, 3, 4)},
    "a stride of one": {"conv_dim": (8, 8, 8), "conv_kernel": (10, 3, 1), "conv_stride": (5, 1, 1)},
}
NORMS = {
    "group": {"feat_extract_norm": "group", "conv_bias": False},
    "group, bias": {"feat_extract_norm": "group", "conv_bias": True},
    "layer": {"feat_extract_norm": "layer", "conv_bias": False},
    "layer, bias": {"feat_extract_norm": "layer", "conv_bias": True},
}


def make_encoder(shape="wav2vec2", norm="group", **changed):
    torch.manual_seed(0)
    sizes = {"conv_dim": (16,) * 7, **SHAPES[shape], **NORMS[norm], **changed}
    encoder = Wav2Vec2FeatureEncoder(Wav2Vec2Config(num_feat_extract_layers=len(sizes["conv_dim"]), **sizes))
    for name, parameter in encoder.named_parameters():
        if "layer_norm" in name:  # as trained ones are: neither 1 nor 0
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return encoder


def assert_same(encoder, audio, recompute=False):
    """Output, and gradients of all parameters, to 1e-4 of the largest."""
    theirs = copy.deepcopy(encoder)
    expected = theirs(audio.clone()).transpose(1, 2)
    output = encode_audio(encoder, audio, recompute)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for out in (output, expected):
        (out * weights).sum().backward()
    for (name, mine), other in zip(encoder.named_parameters(), theirs.parameters(), strict=True):
        if name.endswith("0.conv.bias") and isinstance(
            getattr(encoder.conv_layers[0], "layer_norm", None), torch.nn.GroupNorm
        ):
            assert other.grad.abs().max() < 1e-3  # a group norm takes it out again
            continue
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_transformers(shape, norm):
    assert_same(make_encoder(shape, norm).train(), torch.randn(3, 6011, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("samples", [400, 401, 719, 720, 3200, 3519, 3520, 5120])
def test_equals_transformers_at_any_length(samples):
    """From one frame on, and around the lengths at which the last rows are complete."""
    assert_same(make_encoder().train(), torch.randn(2, samples, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("norm", ["group", "layer, bias"])
def test_recomputed_it_is_the_same(norm):
    assert_same(make_encoder(norm=norm).train(), torch.randn(2, 6000), recompute=True)


def test_a_window_is_encoded_as_it_is_alone():
    encoder, audio = make_encoder(), torch.randn(4, 4321)
    together = encode_audio(encoder, audio)
    for row, window in zip(together, audio):
        torch.testing.assert_close(row, encode_audio(encoder, window[None])[0], rtol=1e-4, atol=1e-6)


def test_too_short_for_a_frame():
    with pytest.raises(ValueError, match="399 samples are too few"):
        encode_audio(make_encoder(), torch.randn(1, 399))


def test_another_activation_goes_transformers_way():
    assert_same(make_encoder(feat_extract_activation="relu").train(), torch.randn(2, 4000))


def test_a_frozen_encoder_gets_no_gradient():
    encoder = make_encoder().train()
    encoder._freeze_parameters()
    assert not encode_audio(encoder, torch.randn(2, 4000)).requires_grad


def test_the_statistics_hold_for_quiet_high_notes_over_loud_low_ones():
    """A difference kernel on a drift a million times as large: in single precision nothing would be left."""
    time = torch.arange(8000) / 16000
    audio = 100 * torch.sin(2 * torch.pi * 2 * time) + 1e-3 * torch.randn(
        8000, generator=torch.Generator().manual_seed(0)
    )
    weight = torch.tensor([[1.0, -2.0, 1.0], [1.0, 1.0, 1.0]])
    mean, variance = output_statistics(audio.unfold(0, 3, 1)[None], weight)
    output = F.conv1d(audio.double()[None, None], weight.double()[:, None])[0]
    torch.testing.assert_close(variance[0].double(), output.var(1, correction=0), rtol=1e-3, atol=0)
    torch.testing.assert_close(mean[0].double(), output.mean(1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (5, 2), (1, 1), (2, 3), (3, 1)])
def test_products_equal_torchs_convolution(kernel, stride):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(12 * stride, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 5, kernel, generator=generator, dtype=torch.float64)
    padded = F.pad(frames.T[None], (0, kernel)).requires_grad_()
    weight.requires_grad_()
    expected = F.conv1d(padded, weight, stride=stride)[0].T[:12]
    output = multiply_taps(frames, weight.detach(), None, stride)
    torch.testing.assert_close(output, expected)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    expected.backward(grad)
    grad_frames, grad_weight = multiply_taps_backward(grad, frames, weight.detach(), stride)
    torch.testing.assert_close(grad_weight, weight.grad)
    torch.testing.assert_close(grad_frames, padded.grad[0].T[: 12 * stride])


def test_the_longest_rows_are_not_kept(monkeypatch):
    made = []

    def spy(*args):
        rows = multiply_first(*args)
        made.append(weakref.ref(rows.untyped_storage()))
        return rows

    monkeypatch.setattr(conv_encoder, "multiply_first", spy)
    output = encode_audio(make_encoder().train(), torch.randn(2, 6400))
    gc.collect()
    assert len(made) == 1
    assert made[0]() is None
    output.sum().backward()
    assert len(made) == 2


def test_half_precision_keeps_a_hum_apart_from_its_offset():
    """What a kernel takes out, a constant, must not come back through rounded weights that the norm has scaled up."""
    encoder = make_encoder().train()
    with torch.no_grad():
        weight = encoder.conv_layers[0].conv.weight
        weight -= weight.mean(-1, keepdim=True)  # high-pass: none of them lets a constant through
    time = torch.arange(16000) / 16000
    audio = (3 + torch.sin(2 * torch.pi * 60 * time))[None]
    exact = encode_audio(encoder, audio)
    with torch.autocast("cpu", torch.bfloat16):
        half = encode_audio(encoder, audio)
    assert (half - exact).norm() < 0.03 * exact.norm()

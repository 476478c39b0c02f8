"""The strided convolutions of wav2vec 2.0 as matrix products, on transformers' modules and their parameters.

With the frames' channels side by side in memory, a kernel of k frames at every s-th frame is a product of rows of s
frames with the first s taps, plus one of the next rows with the taps left over: nothing is copied, transposed or
unfolded. Whole windows follow each other in one long matrix; the few rows that mix two of them are cut off at the end.
GELU, and the layer norm where there is one, are computed again in the backward pass: only their inputs are kept.
"""

import contextlib
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.activations import GELUActivation
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder


def encode_audio(encoder, audio: torch.Tensor, recompute: bool = False) -> torch.Tensor:
    """What transformers' `Wav2Vec2FeatureEncoder` makes of audio, with frames before channels.

    Args:
        encoder: a `Wav2Vec2FeatureEncoder` of either norm.
        audio: (batch, samples).
        recompute: keep nothing for the backward pass; costs a third more time in the convs.

    Returns:
        (batch, frames, channels), in autocast's type where that is on.
    """
    if not all(isinstance(layer.activation, GELUActivation) for layer in encoder.conv_layers):
        return Wav2Vec2FeatureEncoder.forward(encoder, audio).transpose(1, 2)
    if recompute and torch.is_grad_enabled():
        return checkpoint(convolve, encoder, audio, use_reentrant=False, preserve_rng_state=False)
    return convolve(encoder, audio)


def convolve(encoder, audio: torch.Tensor) -> torch.Tensor:
    first, *others = encoder.conv_layers
    layers = encoder.conv_layers
    frames = frames_after(layers, audio.shape[1])
    if frames[-1] < 1:
        raise ValueError(f"{audio.shape[1]} samples are too few for a frame")
    dtype = compute_dtype(audio)
    with torch.autocast(audio.device.type, enabled=False):
        multiple = math.prod(layer.conv.stride[0] for layer in others)
        under_kernel, *affine = first_conv(first, audio, frames[1], multiple)
        rows = multiply_first(under_kernel, *affine, dtype)
        # The first rows are the longest by far and cost next to nothing: made anew for the backward pass.
        hooks = instead_of_keeping(rows, partial(multiply_first, under_kernel, *(x.detach() for x in affine), dtype))
        for before, layer in zip(layers, others):
            weight, bias = layer.conv.weight.to(dtype), layer.conv.bias
            bias = bias if bias is None else bias.to(dtype)
            with hooks:
                rows = ActivateAndConvolve.apply(rows, *norm_of(before), weight, bias, layer.conv.stride[0])
            hooks = contextlib.nullcontext()
        output = activate(rows, *norm_of(layers[-1]))
    return output.view(len(audio), -1, output.shape[-1])[:, : frames[-1]]


def frames_after(layers, samples: int) -> list[int]:
    """How many frames go into the first layer, and come out of each."""
    frames = [samples]
    for layer in layers:
        frames.append((frames[-1] - layer.conv.kernel_size[0]) // layer.conv.stride[0] + 1)
    return frames


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def first_conv(layer, audio: torch.Tensor, frames: int, multiple: int):
    """The first layer as a product of what lies under its kernel: (batch, rows, kernel), weights and shifts.

    A group norm with a group for each channel scales and shifts what a kernel gives by its mean and variance over
    time. Both follow from the mean and covariance of the k samples under the kernel, so the norm goes into the
    weights, one set for each window of the batch, and never touches the frames. Rows are a multiple of `multiple`.
    """
    (kernel,), (stride,), conv = layer.conv.kernel_size, layer.conv.stride, layer.conv
    rows = -(-frames // multiple) * multiple
    samples = F.pad(audio, (0, max((rows - 1) * stride + kernel - audio.shape[1], 0)))
    under_kernel = samples.unfold(1, kernel, stride)[:, :rows]
    weight, shift = conv.weight[:, 0].T, conv.bias if conv.bias is not None else conv.weight.new_zeros(())
    if isinstance(getattr(layer, "layer_norm", None), torch.nn.GroupNorm):
        mean, variance = output_statistics(under_kernel[:, :frames], conv.weight[:, 0])
        scale = layer.layer_norm.weight * (variance + layer.layer_norm.eps).rsqrt()
        weight = weight * scale[:, None]
        # The conv's bias cancels; it stays in the graph, for DDP waits for its gradient.
        shift = (layer.layer_norm.bias - mean * scale)[:, None] + 0 * shift
    return under_kernel, weight, shift


def multiply_first(under_kernel: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, dtype) -> torch.Tensor:
    """(batch * rows, channels): the first layer before its GELU (and layer norm).

    Rounded to `dtype` only then: in half precision a weight that the norm scaled up would leak what it should cancel.
    """
    return torch.matmul(under_kernel, weight).add_(shift).to(dtype).flatten(0, 1)


def instead_of_keeping(tensor: torch.Tensor, make):
    """A context in which autograd keeps not that tensor, but a way to make it again."""
    place, shape = tensor.data_ptr(), tensor.shape  # the graph keeps `pack`, which must not keep the tensor

    def pack(kept):
        return make if kept.data_ptr() == place and kept.shape == shape else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed() if packed is make else packed)


def output_statistics(under_kernel: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance over time, (batch, channels), of what a kernel without bias gives.

    Args:
        under_kernel: (batch, frames, kernel).
        weight: (channels, kernel).
    """
    # In double precision: a high-pass kernel on low sounds takes small differences of large numbers.
    double = torch.float64 if under_kernel.device.type != "mps" else torch.float32
    samples, weight = under_kernel.to(double), weight.to(double)
    mean = samples.mean(1)
    centred = samples - mean[:, None]
    covariance = centred.transpose(1, 2) @ centred / centred.shape[1]
    variance = ((weight @ covariance) * weight).sum(-1).clamp(min=0.0)
    return (mean @ weight.T).to(torch.float32), variance.to(torch.float32)


def norm_of(layer) -> tuple:
    """(weight, bias, eps) of the layer norm before a layer's GELU; Nones where there is none (or a group norm)."""
    norm = getattr(layer, "layer_norm", None)
    if isinstance(norm, torch.nn.LayerNorm):
        return norm.weight, norm.bias, norm.eps
    return None, None, None


def activate(rows: torch.Tensor, weight, bias, eps) -> torch.Tensor:
    """GELU(LayerNorm(rows)), or GELU(rows)."""
    if weight is not None:
        rows = F.layer_norm(rows, rows.shape[-1:], weight.to(rows.dtype), bias.to(rows.dtype), eps)
    return F.gelu(rows)


class ActivateAndConvolve(torch.autograd.Function):
    """A layer's activation and the next layer's convolution: rows (n * stride, C) -> (n, C')."""

    @staticmethod
    def forward(ctx, rows, norm_weight, norm_bias, eps, weight, bias, stride):
        ctx.save_for_backward(rows, norm_weight, norm_bias, weight)
        ctx.eps, ctx.stride = eps, stride
        return multiply_taps(activate(rows, norm_weight, norm_bias, eps), weight, bias, stride)

    @staticmethod
    def backward(ctx, grad):
        rows, norm_weight, norm_bias, weight = ctx.saved_tensors
        normed, statistics = rows, ()
        if norm_weight is not None:
            width, dtype = rows.shape[-1:], rows.dtype
            affine = (norm_weight.to(dtype), norm_bias.to(dtype))
            normed, *statistics = torch.native_layer_norm(rows, width, *affine, ctx.eps)
        grad = grad.contiguous()
        grad_bias = grad.sum(0) if ctx.needs_input_grad[5] else None
        grad_rows, grad_weight = multiply_taps_backward(grad, F.gelu(normed), weight, ctx.stride)
        torch.ops.aten.gelu_backward.grad_input(grad_rows, normed, grad_input=grad_rows)
        grad_norm = (None, None)
        if norm_weight is not None:
            grad_rows, *grad_norm = torch.ops.aten.native_layer_norm_backward(
                grad_rows, rows, width, *statistics, *affine, [True, True, True]
            )
            grad_norm = [value.to(norm_weight.dtype) for value in grad_norm]
        return grad_rows, *grad_norm, None, grad_weight, grad_bias, None


def taps_of(weight: torch.Tensor) -> torch.Tensor:
    """A conv's weight (C', C, k) as (k * C, C')."""
    return weight.permute(2, 1, 0).reshape(-1, len(weight))


def blocks(kernel: int, stride: int, channels: int):
    """(rows ahead, its taps as a slice of k * C, their number) for each product of rows of `stride` frames."""
    for ahead, start in enumerate(range(0, kernel, stride)):
        stop = min(start + stride, kernel)
        yield ahead, slice(start * channels, stop * channels), (stop - start) * channels


def multiply_taps(inputs: torch.Tensor, weight: torch.Tensor, bias, stride: int) -> torch.Tensor:
    """The convolution of frames (n * stride, C) -> (n, C'); the last rows see zeros behind the end."""
    _, channels, kernel = weight.shape
    strides, taps = inputs.view(-1, stride * channels), taps_of(weight)
    output = None
    for ahead, part, width in blocks(kernel, stride, channels):
        if output is None and bias is None:
            output = strides[:, :width] @ taps[part]
        elif output is None:
            output = torch.addmm(bias, strides[:, :width], taps[part])
        else:
            output[: len(output) - ahead].addmm_(strides[ahead:, :width], taps[part])
    return output


def multiply_taps_backward(
    grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, stride: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients with respect to the inputs (n * stride, C) and the weight (C', C, k)."""
    out_channels, channels, kernel = weight.shape
    strides, taps = inputs.view(-1, stride * channels), taps_of(weight)
    grad_taps, grad_strides = torch.empty_like(taps), torch.zeros_like(strides) if kernel < stride else None
    for ahead, part, width in blocks(kernel, stride, channels):
        rows = len(grad) - ahead
        torch.mm(strides[ahead:, :width].T, grad[:rows], out=grad_taps[part])
        if grad_strides is None:
            grad_strides = grad @ taps[part].T
        else:
            grad_strides[ahead:, :width].addmm_(grad[:rows], taps[part].T)
    grad_weight = grad_taps.view(kernel, channels, out_channels).permute(2, 1, 0)
    return grad_strides.view_as(inputs), grad_weight

"""What is slow on a CPU, done another way there. Each equals what it replaces, and steps aside elsewhere.

torch draws dropout's random numbers one after the other on one core, takes the attention apart as soon as it has
dropout, and convolves with long kernels sample by sample.
"""

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2PositionalConvEmbedding

ATTENTION = "sdpa_or_cpu_dropout"

# Attention weights of a window that stay in the cache together, 8 MB. (Measured on two cores: 12 heads at 250 frames
# 33 ms together, 41 each by itself; at 779 frames, 15.6 s of the base model, 280 and 155.)
CACHED_WEIGHTS = 2**21


def use_cpu_kernels(model: torch.nn.Module) -> None:
    """Replace the dropout modules and the attention of a transformers model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is torch.nn.Dropout:
                setattr(module, name, Dropout(child.p))
    if model.config._attn_implementation == "sdpa":
        model.config._attn_implementation = ATTENTION


def is_eager_on_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


# ---- dropout


class Dropout(torch.nn.Dropout):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and 0 < self.p < 1 and is_eager_on_cpu(x):
            return DropoutFunction.apply(x, self.p)
        return super().forward(x)


class DropoutFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        kept, ctx.scale = draw_kept(x.shape, p)
        ctx.save_for_backward(kept)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return (grad * kept).mul_(ctx.scale), None


def draw_kept(shape: torch.Size, p: float) -> tuple[torch.Tensor, float]:
    """(bool mask, the factor on what is kept), with p to 1/65536: four numbers out of each draw of 64 bits."""
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    dropped = min(round(p * 2**16), 2**16 - 1)
    kept = bits.view(torch.int16)[:count] >= dropped - 2**15
    return kept.view(shape), 1 / (1 - dropped / 2**16)


# ---- attention with dropout


def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """transformers' attention interface: fused, where dropout on a CPU would take it apart."""
    if dropout > 0 and attention_mask is None and is_eager_on_cpu(query):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        inputs = (query, key, value)
        if query.shape[1] * query.shape[2] * key.shape[2] > CACHED_WEIGHTS:
            inputs = (x.flatten(0, 1)[:, None] for x in inputs)  # each head by itself
        return DroppedAttention.apply(*inputs, dropout, scaling).view(query.shape).transpose(1, 2), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class DroppedAttention(torch.autograd.Function):
    """softmax(q k^T) with dropout, times v, one row after the other: its weights stay in the cache.

    Kept for the backward pass are the inputs and the dropout's mask; the weights are computed again.
    """

    @staticmethod
    def forward(ctx, query, key, value, p, scaling):
        kept, ctx.scale = draw_kept(torch.Size((*query.shape[:3], key.shape[2])), p)
        ctx.save_for_backward(query, key, value, kept)
        ctx.scaling = scaling
        output = torch.empty(query.shape, dtype=query.dtype)
        for index in range(len(query)):
            weights = attention_weights(query[index], key[index], scaling).mul_(kept[index]).mul_(ctx.scale)
            torch.bmm(weights, value[index], out=output[index])
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, kept = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
        for index in range(len(query)):
            weights = attention_weights(query[index], key[index], ctx.scaling)
            grad_weights = torch.bmm(grad[index], value[index].transpose(1, 2)).mul_(kept[index]).mul_(ctx.scale)
            dropped = (weights * kept[index]).mul_(ctx.scale)
            torch.bmm(dropped.transpose(1, 2), grad[index], out=grads[2][index])
            # The softmax's derivative: w * (g - sum(w * g)).
            inner = torch.mul(weights, grad_weights, out=dropped).sum(-1, keepdim=True)
            grad_scores = grad_weights.sub_(inner).mul_(weights).mul_(ctx.scaling)
            torch.bmm(grad_scores, key[index], out=grads[0][index])
            torch.bmm(grad_scores.transpose(1, 2), query[index], out=grads[1][index])
        return *grads, None, None


def attention_weights(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """(heads, queries, keys) of one window."""
    return torch.bmm(query, key.transpose(1, 2)).mul_(scaling).softmax(-1)


# ---- positional convolution


def positional_conv(module, hidden: torch.Tensor) -> torch.Tensor:
    """transformers' `Wav2Vec2PositionalConvEmbedding`, (batch, frames, width) -> the same; by FFT on a CPU."""
    if not is_eager_on_cpu(hidden):
        return Wav2Vec2PositionalConvEmbedding.forward(module, hidden)
    conv = module.conv
    with torch.autocast("cpu", enabled=False):
        output = convolve_by_fft(hidden.transpose(1, 2).float(), conv.weight.float(), conv.groups)
        output = output + conv.bias.float()[:, None]
    return module.activation(output.to(hidden.dtype)).transpose(1, 2)


def convolve_by_fft(x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Centred convolution by overlap-save: (batch, channels, frames) -> as many frames.

    Blocks of twice the kernel: the kernels' spectra, which are the larger part of the work, stay short.
    """
    frames, kernel = x.shape[2], weight.shape[2]
    size = 2 * kernel
    step = size - kernel + 1
    count = -(-frames // step)
    before, length = kernel // 2, (count - 1) * step + size
    blocks = F.pad(x, (before, length - frames - before)).unfold(2, size, step)
    spectra = torch.fft.rfft(blocks).unflatten(1, (groups, -1))  # (batch, group, in, block, frequency)
    kernels = torch.fft.rfft(weight, size).unflatten(0, (groups, -1))  # (group, out, in, frequency)
    products = torch.einsum("bgimf,goif->bgomf", spectra, kernels.conj())
    output = torch.fft.irfft(products, size)[..., :step]
    return output.reshape(len(x), -1, count * step)[..., :frames]

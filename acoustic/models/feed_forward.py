"""The transformer's feed-forward layers, which are the most of its activations, keeping half of them."""

import torch
from transformers.activations import GELUActivation
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeedForward

from acoustic.models.conv_encoder import ActivateAndConvolve, compute_dtype


class FeedForward(Wav2Vec2FeedForward):
    """GELU is computed again in the backward pass, instead of kept beside its input."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dropped = self.training and self.intermediate_dropout.p > 0
        is_gelu = isinstance(self.intermediate_act_fn, GELUActivation)
        if dropped or not is_gelu or torch.compiler.is_compiling():  # a compiler decides by itself what to keep
            return super().forward(hidden_states)
        rows, layer = self.intermediate_dense(hidden_states), self.output_dense
        dtype = compute_dtype(rows)
        with torch.autocast(rows.device.type, enabled=False):
            # A linear layer is a convolution over one frame.
            weight, bias = layer.weight.to(dtype)[:, :, None], layer.bias.to(dtype)
            output = ActivateAndConvolve.apply(rows.flatten(0, -2), None, None, None, weight, bias, 1)
        return self.output_dropout(output.view(*rows.shape[:-1], -1))

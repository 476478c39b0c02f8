"""The modules of our pretraining in a transformers wav2vec 2.0 with any head: the same results in less time.

On two CPU cores a base model hears about twice as much audio per second; benchmarks/predict.py measures it.
"""

import torch
from transformers.models.wav2vec2 import modeling_wav2vec2

from acoustic.models.conv_encoder import encode_audio
from acoustic.models.cpu import positional_conv, use_cpu_kernels
from acoustic.models.feed_forward import FeedForward


class FeatureEncoder(modeling_wav2vec2.Wav2Vec2FeatureEncoder):
    """(batch, samples) -> (batch, channels, frames)."""

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        recompute = self.gradient_checkpointing and self.training
        return encode_audio(self, input_values, recompute).transpose(1, 2)


class PositionalConv(modeling_wav2vec2.Wav2Vec2PositionalConvEmbedding):
    """(batch, frames, width) -> the same."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return positional_conv(self, hidden_states)


FASTER = {
    modeling_wav2vec2.Wav2Vec2FeatureEncoder: FeatureEncoder,
    modeling_wav2vec2.Wav2Vec2PositionalConvEmbedding: PositionalConv,
    modeling_wav2vec2.Wav2Vec2FeedForward: FeedForward,
}


def use_fast_modules(model: torch.nn.Module) -> None:
    """In place; what isn't wav2vec 2.0's stays as it is. Names and values of the parameters don't change."""
    found = [module for module in model.modules() if type(module) in FASTER]
    for module in found:
        module.__class__ = FASTER[type(module)]
    if found:
        use_cpu_kernels(model)

"""Audio ALBERT (Chi 2020, arXiv 2005.08575): Mockingjay's objective, and one set of weights for all layers."""

import torch
from huggingface_hub.dataclasses import strict
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.albert.modeling_albert import AlbertLayer

from acoustic.models.reconstruction import (
    Reconstruction,
    ReconstructionConfig,
    SpectralEncoder,
    SpectralPreTrainedModel,
    attend_from,
    take_frames,
)


@strict
class AudioAlbertConfig(ReconstructionConfig):
    """Defaults are the paper's: log-mel 80 -> the same, 3 layers (also 6 and 12)."""

    model_type = "audio_albert"


class AudioAlbertPreTrainedModel(SpectralPreTrainedModel):
    config_class = AudioAlbertConfig
    base_model_prefix = "audio_albert"
    _no_split_modules = ["AudioAlbertLayer"]  # what FSDP gathers at a time


class AudioAlbertLayer(GradientCheckpointingLayer, AlbertLayer):
    """transformers' layer, which can compute some frames of its output only."""

    def forward(self, hidden_states, attention_mask=None, places: torch.Tensor | None = None) -> torch.Tensor:
        if places is None:
            return super().forward(hidden_states, attention_mask)
        attention, chosen = self.attention, take_frames(hidden_states, places)
        context = attend_from(attention, chosen, hidden_states, attention_mask, attention.attention_dropout.p)
        context = attention.LayerNorm(chosen + attention.output_dropout(attention.dense(context)))
        return self.full_layer_layer_norm(self.ff_chunk(context) + context)


class AudioAlbertModel(SpectralEncoder, AudioAlbertPreTrainedModel):
    """Mel frames -> the layer of transformers' `AlbertModel`, `num_hidden_layers` times."""

    def add_layers(self, config) -> None:
        self.layer = AudioAlbertLayer(config)

    @property
    def layers(self) -> list:
        return [self.layer] * self.config.num_hidden_layers


class AudioAlbertForPreTraining(Reconstruction, AudioAlbertPreTrainedModel):
    encoder_class = AudioAlbertModel

"""Mockingjay (Liu 2019, arXiv 1910.12638): a BERT over mel frames that reconstructs those hidden from it."""

import torch
from huggingface_hub.dataclasses import strict
from transformers.models.bert.modeling_bert import BertEncoder, BertLayer

from acoustic.models.reconstruction import (
    Reconstruction,
    ReconstructionConfig,
    SpectralEncoder,
    SpectralPreTrainedModel,
    attend_from,
    take_frames,
)

# Beside base, which is the default: log-mel 80 -> log-linear 201.
LARGE = {"num_hidden_layers": 12, "num_deltas": 0, "target": "linear"}


@strict
class MockingjayConfig(ReconstructionConfig):
    """Defaults are S3PRL's base: 80 mel bands with deltas and their deltas, 3 layers.

    `MockingjayConfig(**LARGE)` is its large. The paper's large has 160 mel bands in stacks of 3 frames and predicts
    1025 linear ones.
    """

    model_type = "mockingjay"
    num_deltas: int = 2


class MockingjayPreTrainedModel(SpectralPreTrainedModel):
    config_class = MockingjayConfig
    base_model_prefix = "mockingjay"
    _no_split_modules = ["MockingjayLayer"]  # what FSDP gathers at a time


class MockingjayLayer(BertLayer):
    """transformers' layer, which can compute some frames of its output only."""

    def forward(self, hidden_states, attention_mask=None, places: torch.Tensor | None = None) -> torch.Tensor:
        if places is None:
            return super().forward(hidden_states, attention_mask)
        attention, chosen = self.attention.self, take_frames(hidden_states, places)
        context = attend_from(attention, chosen, hidden_states, attention_mask, attention.dropout.p)
        return self.feed_forward_chunk(self.attention.output(context, chosen))


class MockingjayModel(SpectralEncoder, MockingjayPreTrainedModel):
    """Mel frames -> BERT's layers (section 2.1). BERT's own embeddings stay out: its positions are learned, and end at
    a maximum; here they are sinusoidal."""

    def add_layers(self, config) -> None:
        self.encoder = BertEncoder(config)
        for layer in self.encoder.layer:
            layer.__class__ = MockingjayLayer

    @property
    def layers(self) -> list:
        return list(self.encoder.layer)


class MockingjayForPreTraining(Reconstruction, MockingjayPreTrainedModel):
    encoder_class = MockingjayModel

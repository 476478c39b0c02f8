"""A small encoder that obeys what the heads ask of one, known to transformers' Auto classes as `toy_encoder`."""

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from acoustic.models.heads import EncoderConfig, make_heads, register_heads

HOP = 160


class ToyConfig(EncoderConfig):
    model_type = "toy_encoder"
    hidden_size: int = 16
    feature_size: int = 24
    num_hidden_layers: int = 2
    inputs_to_logits_ratio: int = HOP


class ToyPreTrainedModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"
    main_input_name = "input_values"

    def _init_weights(self, module):
        """Knows nothing of heads."""


class ToyModel(ToyPreTrainedModel):
    """Log spectra of frames of 10 ms -> a linear map -> convolutions over 0.4 s, each added to its input."""

    frozen_parts = ("front.scale",)

    def __init__(self, config):
        super().__init__(config)
        self.front = nn.ModuleDict({"scale": nn.Linear(1, 1), "map": nn.Linear(HOP // 2 + 1, config.feature_size)})
        self.front["scale"].requires_grad_(False)
        self.widen = nn.Linear(config.feature_size, config.hidden_size)
        size = config.hidden_size
        self.layers = nn.ModuleList(nn.Conv1d(size, size, 41, padding=20) for _ in range(config.num_hidden_layers))
        self.post_init()

    def extract_features(self, input_values, attention_mask=None):
        spectra = torch.fft.rfft(input_values.unfold(1, HOP, HOP)).abs().add(1e-2).log()
        return self.front["map"](spectra * self.front["scale"].weight[0, 0])

    def contextualize(self, features, frame_mask=None, output_hidden_states=False):
        hidden = self.widen(features)
        states = [hidden]
        for layer in self.layers:
            if frame_mask is not None:
                hidden = hidden * frame_mask[..., None]
            hidden = hidden + layer(hidden.transpose(1, 2)).transpose(1, 2).relu()
            states.append(hidden)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=tuple(states) if output_hidden_states else None)

    def _get_feat_extract_output_lengths(self, lengths):
        return lengths // HOP

    def _get_feature_vector_attention_mask(self, frames, attention_mask):
        lengths = self._get_feat_extract_output_lengths(attention_mask.sum(-1))
        return torch.arange(frames, device=attention_mask.device) < lengths[:, None]

    def freeze_feature_encoder(self):
        self.front.requires_grad_(False)


transformers.AutoConfig.register(ToyConfig.model_type, ToyConfig)
transformers.AutoModel.register(ToyConfig, ToyModel)
HEADS = make_heads(ToyPreTrainedModel, ToyModel, ToyConfig)
register_heads(ToyConfig, HEADS)

"""What every encoder of ours is: a front end over the waveform, then a context over its frames."""

import torch
from transformers.modeling_outputs import BaseModelOutput


class AudioEncoder:
    """In the bases of an `XModel` it comes before its `XPreTrainedModel`. The heads use nothing but its methods.

    A model adds `extract_features(input_values, attention_mask)`, (batch, samples) -> (batch, frames, feature_size),
    and `contextualize(features, frame_mask, output_hidden_states)`, whose frame_mask (batch, frames) bool is False for
    padding and None where there is none.
    """

    @property
    def front_end(self) -> torch.nn.Module:
        """It has `output_lengths`."""
        return self.encoder

    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs,
    ) -> BaseModelOutput:
        """Both in one: input_values (batch, samples) float32; attention_mask likewise, 0 where padded on the right."""
        features, real = self.extract_features(input_values, attention_mask), None
        if attention_mask is not None:
            real = self._get_feature_vector_attention_mask(features.shape[1], attention_mask)
        return self.contextualize(features, real, output_hidden_states)

    def _get_feat_extract_output_lengths(self, lengths):
        """Frames of so many samples: an int, or a tensor of them."""
        return self.front_end.output_lengths(lengths)

    def _get_feature_vector_attention_mask(self, frames: int, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch, samples) -> (batch, frames) bool."""
        lengths = self._get_feat_extract_output_lengths(attention_mask.sum(-1))
        return torch.arange(frames, device=lengths.device) < lengths[:, None]

    def freeze_feature_encoder(self) -> None:
        self.front_end.requires_grad_(False)

    def get_input_embeddings(self) -> None:
        """Audio has no table of tokens."""

"""wav2vec (Schneider 2019, arXiv 1904.05862): convolutions over the waveform, causal ones over their frames, and a
binary choice between the frames of the next steps and others."""

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedModel

from acoustic.models.predictive import PredictiveConfig, PredictiveObjective, StepPredictor
from acoustic.models.wave_encoder import (
    NORMS,
    ConvContext,
    ConvContextEncoder,
    WaveEncoder,
    check_at_least_1,
    check_choice,
    init_wave_weights,
)


@strict
class Wav2VecConfig(PredictiveConfig):
    """Defaults are wav2vec large's (32.5 M parameters with the head): see `WaveConfig` and `PredictiveConfig`, and

    Args:
        hidden_size: width of the context's layers, whose activation is that of the convs before them.
        context_kernel: one value for each of them. (The paper's small model: nine of 3.)
        context_norm: "group", over channels and time, the paper's; "channel", over the channels at each time, with
            which nothing at all comes from later frames; "none".
    """

    model_type = "wav2vec"

    context_kernel: list[int] | tuple[int, ...] = tuple(range(2, 14))
    context_norm: str = "group"

    def __post_init__(self, **kwargs):
        self.context_kernel = list(self.context_kernel)
        super().__post_init__(**kwargs)
        check_at_least_1(self, "context_kernel")
        if not self.context_kernel:
            raise ValueError("context_kernel needs a value for each layer, at least one")
        check_choice(self, "context_norm", NORMS)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.context_kernel)

    @property
    def num_hidden_states(self) -> int:
        """The features count where they are as wide as the context."""
        return self.num_hidden_layers + (self.feature_size == self.hidden_size)


class Wav2VecPreTrainedModel(PreTrainedModel):
    config_class = Wav2VecConfig
    base_model_prefix = "wav2vec"
    main_input_name = "input_values"
    _no_split_modules = ["ConvLayer"]  # what FSDP gathers at a time

    def _init_weights(self, module) -> None:
        init_wave_weights(module)
        if isinstance(module, StepPredictor):
            module.reset_parameters()


class Wav2VecModel(ConvContextEncoder, Wav2VecPreTrainedModel):
    """The encoder: `extract_features`, the convs over the waveform, then `contextualize`, those over frames."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder = WaveEncoder(config)
        self.context = ConvContext(
            config.feature_size,
            config.hidden_size,
            config.context_kernel,
            config.context_norm,
            config.feat_extract_activation,
        )
        self.post_init()

    def extract_features(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, samples) float32, and 0 where padded on the right -> (batch, frames, feature_size)."""
        return self.encoder(input_values, attention_mask)


class Wav2VecForPreTraining(PredictiveObjective, Wav2VecPreTrainedModel):
    """Sections 2.2 and 3: from each context the next steps (with the paper's encoder t + 3 to t + 14), each told from
    10 frames of the same window by a binary cross-entropy; the maps of all steps share a bias."""

    encoder_class = Wav2VecModel
    predictor_bias = True

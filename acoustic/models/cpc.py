"""CPC (van den Oord 2018, arXiv 1807.03748): convolutions over the waveform, a recurrent context, InfoNCE."""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from acoustic.models.encoder import AudioEncoder
from acoustic.models.predictive import PredictiveConfig, PredictiveObjective, StepPredictor
from acoustic.models.wave_encoder import WaveEncoder, check_at_least_1, check_choice, init_wave_weights

CONTEXTS = {"gru": nn.GRU, "lstm": nn.LSTM}


@strict
class CPCConfig(PredictiveConfig):
    """Defaults are the paper's (section 3.1); see `WaveConfig` and `PredictiveConfig`, and

    Args:
        hidden_size, num_hidden_layers: of the recurrent context.
        context_type: "gru" or "lstm".

    The modified CPC (Riviere 2020, arXiv 2002.02848): conv_dim five times 256, feat_extract_norm "channel", LSTM.
    The paper doesn't say how many negatives it took; 128 for each frame is Riviere's number.
    """

    model_type = "cpc"

    hidden_size: int = 256
    num_hidden_layers: int = 1
    context_type: str = "gru"
    conv_dim: list[int] | tuple[int, ...] = (512,) * 5
    conv_kernel: list[int] | tuple[int, ...] = (10, 8, 4, 4, 4)
    conv_stride: list[int] | tuple[int, ...] = (5, 4, 2, 2, 2)
    conv_bias: bool = True
    feat_extract_norm: str = "none"
    log_compression: bool = False
    offset: int | str = 1
    num_negatives: int = 128
    negatives_from: str = "batch"
    loss_type: str = "infonce"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_at_least_1(self, "num_hidden_layers")
        check_choice(self, "context_type", tuple(CONTEXTS))

    @property
    def num_hidden_states(self) -> int:
        """The features count where they are as wide as the context."""
        return self.num_hidden_layers + (self.feature_size == self.hidden_size)


class CPCPreTrainedModel(PreTrainedModel):
    config_class = CPCConfig
    base_model_prefix = "cpc"
    main_input_name = "input_values"
    _no_split_modules = ["ConvLayer"]  # what FSDP gathers at a time

    def _init_weights(self, module) -> None:
        init_wave_weights(module)
        if isinstance(module, StepPredictor):
            module.reset_parameters()
        elif isinstance(module, (nn.GRU, nn.LSTM)):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)


class CPCModel(AudioEncoder, CPCPreTrainedModel):
    """The encoder: `extract_features`, the convs over the waveform, then `contextualize`, recurrent over frames.

    Both see the past only (with feat_extract_norm "none" or "channel"), so padding on the right changes nothing.
    """

    def __init__(self, config):
        super().__init__(config)
        self.encoder = WaveEncoder(config)
        widths = [config.feature_size] + [config.hidden_size] * config.num_hidden_layers
        recurrent = CONTEXTS[config.context_type]
        # One by one, for the output of each.
        self.context = nn.ModuleList(
            recurrent(in_dim, dim, batch_first=True) for in_dim, dim in zip(widths, widths[1:])
        )
        self.post_init()

    def extract_features(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, samples) float32, and 0 where padded on the right -> (batch, frames, feature_size)."""
        return self.encoder(input_values, attention_mask)

    def contextualize(
        self, features: torch.Tensor, frame_mask: torch.Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutput:
        """features: (batch, frames, feature_size). frame_mask isn't needed: what is padded comes last."""
        hidden, states = features, [features] if self.config.feature_size == self.config.hidden_size else []
        for layer in self.context:
            # On a CPU autocast gives half-precision features, and leaves the weights of a GRU as they are.
            hidden = layer(hidden.to(layer.weight_ih_l0.dtype))[0]
            states.append(hidden)
        return BaseModelOutput(hidden, tuple(states) if output_hidden_states else None)

    def compile_regions(self, **options) -> None:
        """The convs; a recurrence is one kernel already."""
        self.encoder.compile(**options)


class CPCForPreTraining(PredictiveObjective, CPCPreTrainedModel):
    """Sections 2.2 and 2.3: from each context the next 12 frames, by a matrix each, told from frames of the batch."""

    encoder_class = CPCModel
    predictor_bias = False

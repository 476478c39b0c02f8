"""vq-wav2vec (Baevski 2019, arXiv 1910.05453): wav2vec with a quantizer between the convs and the context, whose codes
are the targets, and afterwards the words of a language model (code_bert.py).

    python -m acoustic.models.vq_wav2vec export MODEL AUDIO --output codes.parquet
"""

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedModel

from acoustic.models.predictive import PredictiveConfig, PredictiveObjective, PredictiveOutput, StepPredictor
from acoustic.models.quantizers import GUMBEL_OPTIONS, QUANTIZERS, Quantized, code_metrics, count_codes
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
class VQWav2VecConfig(PredictiveConfig):
    """Defaults are the paper's (section 5.2), Gumbel; see `WaveConfig` and `PredictiveConfig`, and

    Args:
        quantizer_type: "gumbel" or "kmeans".
        num_codevector_groups, num_codevectors_per_group: of the codebook.
        share_codevectors: one codebook for all groups.
        hidden_size, context_kernel, context_norm: of the context, as in wav2vec.
    """

    model_type = "vq_wav2vec"

    conv_dim: list[int] | tuple[int, ...] = (512,) * 8
    conv_kernel: list[int] | tuple[int, ...] = (10, 8, 4, 4, 4, 1, 1, 1)
    conv_stride: list[int] | tuple[int, ...] = (5, 4, 2, 2, 2, 1, 1, 1)
    feat_extract_activation: str = "gelu"
    context_kernel: list[int] | tuple[int, ...] = tuple(range(2, 14))
    context_norm: str = "group"
    quantizer_type: str = "gumbel"
    num_codevector_groups: int = 2
    num_codevectors_per_group: int = 320
    share_codevectors: bool = True

    def __post_init__(self, **kwargs):
        self.context_kernel = list(self.context_kernel)
        super().__post_init__(**kwargs)
        check_at_least_1(self, "context_kernel", "num_codevector_groups", "num_codevectors_per_group")
        check_choice(self, "context_norm", NORMS)
        check_choice(self, "quantizer_type", tuple(QUANTIZERS))
        if not self.context_kernel:
            raise ValueError("context_kernel needs a value for each layer, at least one")
        if self.feature_size % self.num_codevector_groups:
            raise ValueError(
                f"conv_dim ends with {self.feature_size}, not a multiple of num_codevector_groups "
                f"{self.num_codevector_groups}"
            )

    @property
    def num_hidden_layers(self) -> int:
        return len(self.context_kernel)

    @property
    def num_hidden_states(self) -> int:
        """The quantized features count where they are as wide as the context."""
        return self.num_hidden_layers + (self.feature_size == self.hidden_size)


def make_quantizer(config: VQWav2VecConfig):
    quantizer = QUANTIZERS[config.quantizer_type]
    shape = (config.feature_size, config.num_codevector_groups, config.num_codevectors_per_group)
    return quantizer(*shape, config.share_codevectors)


def init_vq_weights(module) -> None:
    """For an `_init_weights`."""
    init_wave_weights(module)
    if isinstance(module, (StepPredictor, *QUANTIZERS.values())):
        module.reset_parameters()


class VQWav2VecPreTrainedModel(PreTrainedModel):
    config_class = VQWav2VecConfig
    base_model_prefix = "vq_wav2vec"
    main_input_name = "input_values"
    _no_split_modules = ["ConvLayer"]  # what FSDP gathers at a time

    def _init_weights(self, module) -> None:
        init_vq_weights(module)


class VQWav2VecModel(ConvContextEncoder, VQWav2VecPreTrainedModel):
    """The encoder: convs over the waveform and their quantizer, then `contextualize`, convs over frames."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder = WaveEncoder(config)
        self.quantizer = make_quantizer(config)
        self.context = ConvContext(
            config.feature_size,
            config.hidden_size,
            config.context_kernel,
            config.context_norm,
            config.feat_extract_activation,
        )
        self.post_init()

    def quantize_audio(self, input_values, attention_mask=None, sample: bool = False) -> Quantized:
        """What the quantizer makes of (batch, samples); sample: draw the codes, as pretraining does."""
        features = self.encoder(input_values, attention_mask)
        real = None
        if attention_mask is not None:
            real = self._get_feature_vector_attention_mask(features.shape[1], attention_mask)
        return self.quantizer(features, real, sample)

    @torch.no_grad()
    def quantize(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, samples) float32, and 0 where padded on the right -> codes (batch, frames, groups) int64."""
        return self.quantize_audio(input_values, attention_mask).codes

    def extract_features(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, samples) -> the quantized frames (batch, frames, feature_size), by the likeliest codes."""
        return self.quantize_audio(input_values, attention_mask).frames

    def freeze_feature_encoder(self) -> None:
        """The convs over the waveform and the quantizer."""
        self.encoder.requires_grad_(False)
        self.quantizer.requires_grad_(False)


class VQWav2VecForPreTraining(PredictiveObjective, VQWav2VecPreTrainedModel):
    """Section 3: wav2vec's task with the quantized frames as input of the context, targets and negatives."""

    encoder_class = VQWav2VecModel
    predictor_bias = True
    options = GUMBEL_OPTIONS

    @property
    def anneals(self) -> bool:
        return self.config.quantizer_type == "gumbel"

    @property
    def codes(self) -> tuple[int, int]:
        """(groups, entries of each)."""
        return self.config.num_codevector_groups, self.config.num_codevectors_per_group

    @property
    def metric_names(self) -> tuple[str, ...]:
        quantizer = () if self.anneals else ("quantizer_loss",)
        return (*super().metric_names, *quantizer, "code_perplexity", "lowest_group_perplexity")

    def set_gumbel_temperature(self, temperature: float) -> None:
        self.vq_wav2vec.quantizer.set_temperature(temperature)

    def forward(self, input_values: torch.Tensor, seed: int | None = None) -> PredictiveOutput:
        """
        Args:
            input_values: (rows, samples) float32, without padding.
            seed: of the negatives; without one it is drawn from torch's CPU generator.
        """
        self.check_length(input_values.shape[1])
        quantized = self.vq_wav2vec.quantize_audio(input_values, sample=self.training)
        context = self.vq_wav2vec.contextualize(quantized.frames).last_hidden_state
        output = self.predict(context, quantized.frames, seed)
        if quantized.loss is not None:
            quantizer_loss = quantized.loss * output.num_targets
            output.loss = output.loss + quantizer_loss
            output.metrics["quantizer_loss"] = quantizer_loss.detach()
        output.metrics |= code_metrics(quantized.codes, self.codes[1], output.num_targets)
        return output

    def code_usage(self, input_values: torch.Tensor) -> torch.Tensor:
        """How often each code is taken: (groups, entries) int64."""
        return count_codes(self.vq_wav2vec.quantize(input_values), self.codes[1])

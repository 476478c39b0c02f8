"""Heads for fine-tuning, on any encoder of ours: CTC, one class for a clip, one class for each frame.

Names of parameters and settings are those of transformers' heads on wav2vec 2.0. An encoder gives its frames in two
steps, `extract_features` and `contextualize`; between them SpecAugment (Park 2019, arXiv 1904.08779) hides some.
"""

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput, TokenClassifierOutput

from acoustic.models.masking import draw_spans


class EncoderConfig(PretrainedConfig):
    """What the heads read from an encoder's config; the encoders' configs derive from it.

    Names and defaults are those of `Wav2Vec2Config`, but for mask_time_prob: nothing is masked unless asked for.

    Args:
        vocab_size, pad_token_id: of the characters of CTC; the padding token is its blank.
        ctc_zero_infinity: leave out clips that are too short for their transcript.
        classifier_proj_size: width between the frames and the classes of a clip.
        use_weighted_layer_sum: learn a weight for each layer (SUPERB, Yang 2021, arXiv 2105.01051, section 3.1)
            instead of taking the last one's output.
        mask_time_prob, mask_time_length: SpecAugment in training: spans of so many frames set to 0, that share of the
            frames before overlaps; mask_feature_prob, mask_feature_length: likewise the channels of a clip.
    """

    vocab_size: int = 32
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    final_dropout: float | int = 0.1
    ctc_loss_reduction: str = "sum"
    ctc_zero_infinity: bool = False
    classifier_proj_size: int = 256
    use_weighted_layer_sum: bool = False
    apply_spec_augment: bool = True
    mask_time_prob: float | int = 0.0
    mask_time_length: int = 10
    mask_feature_prob: float | int = 0.0
    mask_feature_length: int = 10
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        for name in ("mask_time_length", "mask_feature_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")
        for name in ("mask_time_prob", "mask_feature_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: a share from 0 to 1")
        super().__post_init__(**kwargs)


class Head:
    """What the heads share. In the bases of a head's class it comes before the encoder's `XPreTrainedModel`."""

    encoder_class: type
    head_layers: tuple[str, ...]

    def __init__(self, config):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.encoder_class(config))
        self.add_head(config)
        if config.use_weighted_layer_sum:
            # Equal at first, as in SUPERB.
            self.layer_weights = nn.Parameter(torch.zeros(count_hidden_states(config)))
        self.post_init()

    def _init_weights(self, module) -> None:
        """The head's own; the rest is the encoder's."""
        if module is self:
            if self.config.use_weighted_layer_sum:
                init.zeros_(self.layer_weights)
        elif any(module is getattr(self, name) for name in self.head_layers):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> None:
        """Audio has no table of tokens."""

    def freeze_feature_encoder(self) -> None:
        self.base_model.freeze_feature_encoder()

    def freeze_base_model(self) -> None:
        self.base_model.requires_grad_(False)

    def _get_feat_extract_output_lengths(self, lengths):
        return self.base_model._get_feat_extract_output_lengths(lengths)

    def _get_feature_vector_attention_mask(self, frames: int, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.base_model._get_feature_vector_attention_mask(frames, attention_mask)

    def encode(self, input_values, attention_mask, output_hidden_states: bool):
        """The frames that the head looks at (batch, frames, hidden_size), which of them are real (batch, frames) or
        None where all are, and the hidden states where they are asked for."""
        weighted = self.config.use_weighted_layer_sum
        features = self.base_model.extract_features(input_values, attention_mask)
        real = None
        if attention_mask is not None:
            real = self._get_feature_vector_attention_mask(features.shape[1], attention_mask)
        if self.training and self.config.apply_spec_augment:
            features = augment(features, real, self.config)
        outputs = self.base_model.contextualize(features, real, output_hidden_states=weighted or output_hidden_states)
        hidden = outputs.last_hidden_state
        if weighted:
            shares = self.layer_weights.softmax(-1)
            hidden = sum(share * states for share, states in zip(shares, outputs.hidden_states, strict=True))
        return hidden, real, outputs.hidden_states if output_hidden_states else None


class CTCHead(Head):
    """Characters by connectionist temporal classification (Graves 2006): dropout and a linear map of each frame."""

    head_layers = ("lm_head",)

    def add_head(self, config) -> None:
        self.dropout = nn.Dropout(config.final_dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> CausalLMOutput:
        """
        Args:
            input_values: (batch, samples) float32.
            attention_mask: (batch, samples), 0 where padded.
            labels: (batch, characters) int64, padded with -100.

        Returns:
            logits (batch, frames, vocab_size); with labels the loss, reduced as `config.ctc_loss_reduction` says.
        """
        if labels is not None and labels.max() >= self.config.vocab_size:
            raise ValueError(f"labels must be below vocab_size, {self.config.vocab_size}")
        hidden, real, states = self.encode(input_values, attention_mask, output_hidden_states)
        logits = self.lm_head(self.dropout(hidden))
        loss = None
        if labels is not None:
            batch, frames = logits.shape[:2]
            lengths = torch.full((batch,), frames, device=logits.device) if real is None else real.sum(-1)
            loss = ctc_loss(logits, lengths, labels, self.config)
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=states)


class SequenceClassificationHead(Head):
    """One class for a clip: a linear map of each frame, their mean, and a linear map to the classes."""

    head_layers = ("projector", "classifier")

    def add_head(self, config) -> None:
        self.projector = nn.Linear(config.hidden_size, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)

    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_values: (batch, samples) float32.
            attention_mask: (batch, samples), 0 where padded.
            labels: (batch,) int64.

        Returns:
            logits (batch, num_labels); with labels the cross-entropy, its mean over the clips.
        """
        hidden, real, states = self.encode(input_values, attention_mask, output_hidden_states)
        logits = self.classifier(mean_over_real(self.projector(hidden), real))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=states)


class FrameClassificationHead(Head):
    """A class for each frame: one linear map."""

    head_layers = ("classifier",)

    def add_head(self, config) -> None:
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> TokenClassifierOutput:
        """
        Args:
            input_values: (batch, samples) float32.
            attention_mask: (batch, samples), 0 where padded.
            labels: (batch, frames) int64, -100 where a frame has none; or one-hot (batch, frames, num_labels), as
                transformers takes them.

        Returns:
            logits (batch, frames, num_labels); with labels the mean cross-entropy over the frames that have one.
            Padding has none. (transformers' head counts it.)
        """
        hidden, real, states = self.encode(input_values, attention_mask, output_hidden_states)
        logits = self.classifier(hidden)
        loss = None
        if labels is not None:
            labels = labels.argmax(-1) if labels.dim() == 3 else labels
            labels = labels if real is None else labels.masked_fill(~real, -100)
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=states)


HEADS = {
    "ctc": ("ForCTC", CTCHead, transformers.AutoModelForCTC),
    "classification": (
        "ForSequenceClassification",
        SequenceClassificationHead,
        transformers.AutoModelForAudioClassification,
    ),
    "frames": (
        "ForAudioFrameClassification",
        FrameClassificationHead,
        transformers.AutoModelForAudioFrameClassification,
    ),
}


def make_heads(pretrained_class, model_class, config_class) -> dict[str, type]:
    """The classes with a head on an encoder, by kind: `XModel` gives XForCTC, XForSequenceClassification, ...

    transformers' Auto classes want one for each class of config.
    """
    stem = model_class.__name__.removesuffix("Model")
    return {
        kind: type(
            stem + suffix,
            (head, pretrained_class),
            {"__doc__": head.__doc__, "encoder_class": model_class, "config_class": config_class},
        )
        for kind, (suffix, head, _) in HEADS.items()
    }


def register_heads(config_class, heads: dict[str, type]) -> None:
    """Makes them known to transformers' Auto classes for CTC, audio and audio frame classification."""
    for kind, model_class in heads.items():
        HEADS[kind][2].register(config_class, model_class, exist_ok=True)


def count_hidden_states(config) -> int:
    """Tensors in an encoder's `hidden_states`."""
    return getattr(config, "num_hidden_states", None) or config.num_hidden_layers + 1


def ctc_loss(logits: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor, config) -> torch.Tensor:
    """In float32; logits (batch, frames, vocabulary), lengths (batch,) in frames, labels (batch, characters)."""
    log_probs = logits.log_softmax(-1, dtype=torch.float32).transpose(0, 1)
    # cuDNN's has other limits and is not deterministic.
    with torch.backends.cudnn.flags(enabled=False):
        return F.ctc_loss(
            log_probs,
            labels.clamp(min=0),
            lengths,
            (labels >= 0).sum(-1),
            blank=config.pad_token_id,
            reduction=config.ctc_loss_reduction,
            zero_infinity=config.ctc_zero_infinity,
        )


def mean_over_real(hidden: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """(batch, frames, width) -> (batch, width); `real` (batch, frames) bool, or None where all frames are."""
    if real is None:
        return hidden.mean(1)
    return hidden.masked_fill(~real[..., None], 0).sum(1) / real.sum(1, keepdim=True)


def augment(features: torch.Tensor, real: torch.Tensor | None, config) -> torch.Tensor:
    """SpecAugment: spans of frames and spans of channels become 0, others in each clip.

    Args:
        features: (batch, frames, channels).
        real: (batch, frames) bool, False for padding; None where there is none.

    Drawn on the device from a seed that comes from torch's CPU generator, whose state a checkpoint keeps.
    """
    batch, frames, channels = features.shape
    generator = torch.Generator(features.device).manual_seed(int(torch.randint(2**62, ())))
    if config.mask_time_prob > 0:
        hidden = draw_hidden(batch, frames, config.mask_time_prob, config.mask_time_length, generator, real)
        features = features.masked_fill(hidden[:, :, None], 0)
    if config.mask_feature_prob > 0:
        hidden = draw_hidden(batch, channels, config.mask_feature_prob, config.mask_feature_length, generator)
        features = features.masked_fill(hidden[:, None, :], 0)
    return features


def draw_hidden(batch: int, size: int, prob: float, length: int, generator, real=None) -> torch.Tensor:
    """Spans (batch, size) bool; a row of which nothing real would be left stays as it is."""
    hidden = draw_spans(batch, size, prob, length, 0, generator)
    gone = hidden if real is None else hidden | ~real
    return hidden & ~gone.all(1, keepdim=True)

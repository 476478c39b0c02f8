"""Masked reconstruction of spectral frames, which Mockingjay (Liu 2019, arXiv 1910.12638) and Audio ALBERT share."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward
from transformers.utils import ModelOutput

from acoustic.models.cpu import use_cpu_kernels
from acoustic.models.encoder import AudioEncoder
from acoustic.models.features import TARGETS, MelConfig, MelFeatures, check_whole

SHARES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "mask_time_prob",
    "mask_zero_prob",
    "mask_replace_prob",
    "mask_bands",
)


class ReconstructionConfig(MelConfig):
    """Names of the transformer's values are those of `BertConfig`.

    Args:
        target: "input", the frames that went in; or "linear", the log-linear spectrum of the same audio.
        mask_time_prob: share of the frames of each window that are chosen, in whole spans that do not overlap.
        mask_time_length: frames of a span.
        mask_zero_prob, mask_replace_prob: how likely the chosen frames of a window are set to 0, or to other spans of
            it; else they are left as they are (.8, .1 and .1 in the paper, section 2.2).
        mask_bands: share of the mel bands, neighbours, that are set to 0 throughout a window, others in each (TERA,
            Liu 2020, arXiv 2007.06028). For steady sounds, whose hidden frames look like those beside them.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 3
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float | int = 1e-12
    target: str = "input"
    mask_time_prob: float | int = 0.15
    mask_time_length: int = 7
    mask_zero_prob: float | int = 0.8
    mask_replace_prob: float | int = 0.1
    mask_bands: float | int = 0.0

    # What transformers' layers ask for beside these.
    is_decoder = False
    add_cross_attention = False

    def __post_init__(self, **kwargs):
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            check_whole(name, getattr(self, name), 1)
        check_whole("mask_time_length", self.mask_time_length, 1)
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be even, and a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r}: transformers has no such activation")
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, not {self.target!r}")
        for name in SHARES:
            check_share(name, getattr(self, name))
        if self.mask_zero_prob + self.mask_replace_prob > 1 + 1e-9:
            raise ValueError(
                "mask_zero_prob + mask_replace_prob are shares of the windows; their sum can't be above 1"
            )
        if self.hidden_bands >= self.num_mel_bands:
            raise ValueError(f"mask_bands {self.mask_bands:g} would hide all of the {self.num_mel_bands} mel bands")
        super().__post_init__(**kwargs)

    @property
    def target_size(self) -> int:
        """Values of a frame to reconstruct."""
        return self.feature_size if self.target == "input" else self.linear_size

    @property
    def hidden_bands(self) -> int:
        return round(self.mask_bands * self.num_mel_bands)

    def count_spans(self, frames: int) -> int:
        """How many are chosen in a window of so many frames: `mask_time_prob` of them, rounded to whole spans, at
        least one; 0 where nothing would be left to reconstruct from."""
        if frames <= self.mask_time_length:
            return 0
        wanted = max(round(self.mask_time_prob * frames / self.mask_time_length), 1)
        return min(wanted, (frames - 1) // self.mask_time_length)


def check_share(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share, from 0 to 1, not {value!r}")


# ---- what is hidden


@dataclass
class Corruption:
    """What is done to a batch of windows: (batch, chosen) int64 each, (batch, 1) bool, (batch, 1) int64 or None."""

    places: torch.Tensor  # the chosen frames, in rising order
    others: torch.Tensor  # the frames of other spans, to take their place
    is_zeroed: torch.Tensor  # windows whose chosen frames become 0
    is_replaced: torch.Tensor  # ... become the others; neither: they stay
    first_band: torch.Tensor | None  # of those that are hidden

    def apply(self, features: torch.Tensor, config: ReconstructionConfig) -> torch.Tensor:
        """(batch, frames, feature_size) -> the same with the chosen frames (and bands) hidden."""
        sources = torch.where(self.is_replaced, self.others, self.places)
        frames = take_frames(features, sources).masked_fill(self.is_zeroed[..., None], 0)
        corrupted = features.scatter(1, self.places[..., None].expand_as(frames), frames)
        if self.first_band is None:
            return corrupted
        bands = torch.arange(config.num_mel_bands, device=features.device) - self.first_band
        hidden = (bands >= 0) & (bands < config.hidden_bands)
        # Of each stacked frame, and of its deltas too.
        by_band = corrupted.unflatten(-1, (-1, config.num_mel_bands))
        return by_band.masked_fill(hidden[:, None, None], 0).flatten(-2)


def draw_corruption(batch: int, frames: int, config: ReconstructionConfig, generator: torch.Generator) -> Corruption:
    """One die for each window says what becomes of all its chosen frames (Liu 2019, section 2.2)."""
    device, count, length = generator.device, config.count_spans(frames), config.mask_time_length
    starts = draw_starts(batch, frames, count, length, generator)
    within = torch.arange(length, device=device)
    others = torch.randint(frames - length, starts.shape, generator=generator, device=device)
    others += others >= starts  # any span but itself
    die = torch.rand(batch, 1, generator=generator, device=device)
    is_zeroed = die < config.mask_zero_prob
    is_replaced = ~is_zeroed & (die < config.mask_zero_prob + config.mask_replace_prob)
    first_band = None
    if config.hidden_bands:
        choices = config.num_mel_bands - config.hidden_bands + 1
        first_band = torch.randint(choices, (batch, 1), generator=generator, device=device)
    places, others = ((spans[..., None] + within).flatten(1) for spans in (starts, others))
    return Corruption(places, others, is_zeroed, is_replaced, first_band)


def draw_starts(batch: int, frames: int, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """(batch, count) int64 in rising order: spans that do not overlap, all arrangements of them equally likely.

    So each window has the same number of chosen frames, in whole spans: a single frame left visible in the middle of a
    span would give it away. (S3PRL lets spans overlap and has 14 % where 15 % are asked for.)
    """
    # Each span shrunk to one frame, any `count` of what is left will do.
    shrunk = torch.rand(batch, frames - count * (length - 1), generator=generator, device=generator.device)
    starts = shrunk.topk(count, dim=1).indices.sort(dim=1).values
    return starts + torch.arange(count, device=generator.device) * (length - 1)


def take_frames(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(batch, frames, width), (batch, taken) int64 -> (batch, taken, width)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


# ---- parts of the models


class InputLayer(nn.Module):
    """Linear map, plus sinusoidal positions (Vaswani 2017, section 3.5), LayerNorm, dropout."""

    def __init__(self, config):
        super().__init__()
        self.projection = nn.Linear(config.feature_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.projection(features.to(self.projection.weight.dtype))
        # Added in float32 under autocast: half precision would round neighbouring positions to the same.
        hidden = hidden + sinusoids(*hidden.shape[1:], hidden.device)
        return self.dropout(self.layer_norm(hidden.to(self.layer_norm.weight.dtype)))


def sinusoids(frames: int, width: int, device) -> torch.Tensor:
    """(frames, width) float32: sines, then cosines."""
    rates = 10_000 ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / -width)
    angles = torch.arange(frames, dtype=torch.float32, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ReconstructionHead(nn.Module):
    """Linear, GELU, LayerNorm, linear to a frame."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.target_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.output(self.layer_norm(F.gelu(self.dense(hidden))))


def attend_from(attention, queries: torch.Tensor, hidden: torch.Tensor, mask, dropout: float) -> torch.Tensor:
    """What transformers' `BertSelfAttention` and `AlbertAttention` compute, for some frames only.

    Args:
        queries: (batch, some, width); hidden: (batch, frames, width).

    Returns:
        (batch, some, width).
    """
    heads = [
        project(x).unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)
        for project, x in ((attention.query, queries), (attention.key, hidden), (attention.value, hidden))
    ]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    mask = mask if mask is None else mask[:, :, :1]  # of keys, the same for each query
    dropout = dropout if attention.training else 0.0
    return attend(attention, *heads, mask, dropout=dropout, scaling=attention.scaling)[0].flatten(-2)


class SpectralPreTrainedModel(PreTrainedModel):
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module) -> None:
        """Normal with `initializer_range`, as BERT."""
        if isinstance(module, MelFeatures):
            module.reset()
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> None:
        """Audio has no table of tokens."""


class SpectralEncoder(AudioEncoder):
    """Mel frames through transformer layers. In the bases of a model it comes before its `XPreTrainedModel`.

    A model has `layers`: modules called with (hidden, attention mask, places), where with places only those frames
    come out.
    """

    @property
    def front_end(self) -> nn.Module:
        return self.features

    def __init__(self, config):
        super().__init__(config)
        self.features = MelFeatures(config)
        self.input_layer = InputLayer(config)
        self.add_layers(config)
        use_cpu_kernels(self)
        self.post_init()

    def extract_features(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, samples) float32 -> (batch, frames, feature_size), normalised over the true length; see
        `MelFeatures`. attention_mask: (batch, samples), 0 where padded."""
        return self.features(input_values, attention_mask)[0]

    def contextualize(
        self,
        features: torch.Tensor,
        frame_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        places: torch.Tensor | None = None,
    ) -> BaseModelOutput:
        """
        Args:
            features: (batch, frames, feature_size).
            frame_mask: (batch, frames) bool, False where padded; None where nothing is: attention is then fused.
            places: (batch, some) int64, the only frames of the last layer that are wanted; without it, all are.

        Returns:
            last_hidden_state (batch, frames, hidden_size), or (batch, some, hidden_size); on request hidden_states,
            what the first layer gets and what each gives.
        """
        hidden = self.input_layer(features)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=frame_mask)
        states, last = [hidden], len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, mask, places if index == last else None)
            states.append(hidden)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=tuple(states) if output_hidden_states else None)


@dataclass
class ReconstructionOutput(ModelOutput):
    """The loss and `metrics` are sums over `num_targets` chosen frames."""

    loss: torch.Tensor | None = None
    num_targets: int | None = None
    num_frames: int | None = None
    metrics: dict | None = None


class Reconstruction:
    """The objective: L1 on the chosen frames (Liu 2019, section 2.2). In the bases it comes before `XPreTrainedModel`.

    Only the chosen frames go through the head, and through what follows the keys and values of the last layer.
    """

    encoder_class: type
    family = "reconstruction"
    normalizes_audio = False
    metric_names = ("reconstruction_loss", "mean_predictor_loss")
    config_options = ("mask_time_prob", "mask_time_length")
    options = config_options
    # A fine-tuned checkpoint has those of its SpecAugment.
    pretraining_config = {"mask_time_prob": 0.15, "mask_time_length": 7}

    def __init__(self, config):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.encoder_class(config))
        self.head = ReconstructionHead(config)
        self.post_init()

    def count_targets(self, rows: int, samples: int) -> int:
        """Frames that are chosen in a batch of that shape; 0 where the windows are too short."""
        return rows * self.config.count_spans(self.count_frames(samples)) * self.config.mask_time_length

    def count_frames(self, samples: int) -> int:
        return self.base_model._get_feat_extract_output_lengths(samples)

    def compile_regions(self, **options) -> None:
        """`torch.compile` for each transformer layer, and for the head with the loss."""
        for layer in dict.fromkeys(self.base_model.layers):
            layer.compile(**options)
        self.score = torch.compile(self.score, **options)

    def read(self, input_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, frames, feature_size) to hide frames of, and (batch, frames, target_size) to reconstruct."""
        features, spectrum = self.base_model.features(input_values, linear=self.config.target == "linear")
        return features, features if spectrum is None else spectrum

    def draw_corruption(self, batch: int, frames: int, seed: int | None) -> Corruption:
        if not self.config.count_spans(frames):
            raise ValueError(
                f"a window of {frames} frames is too short: it must be longer than a masked span of "
                f"{self.config.mask_time_length} (mask_time_length)"
            )
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        return draw_corruption(batch, frames, self.config, torch.Generator(self.device).manual_seed(seed))

    def draw_mask(self, batch: int, samples: int, seed: int) -> torch.Tensor:
        """Which frames are to be reconstructed, as in training: (batch, frames) bool."""
        frames = self.count_frames(samples)
        places = self.draw_corruption(batch, frames, seed).places
        return torch.zeros(batch, frames, dtype=torch.bool, device=places.device).scatter_(1, places, True)

    def score(self, hidden: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The L1 distance of the prediction and that of the mean, which is 0: each the mean over the cells of a frame,
        summed over frames. hidden, target: (batch, chosen, ...)."""
        distance = (self.head(hidden).float() - target).abs().mean(-1).sum()
        return distance, target.abs().mean(-1).sum()

    def forward(self, input_values: torch.Tensor, seed: int | None = None, **kwargs) -> ReconstructionOutput:
        """
        Args:
            input_values: (batch, samples) float32, nothing padded.
            seed: of what is drawn; without one it is drawn from torch's CPU generator.
        """
        if unknown := [name for name, value in kwargs.items() if value is not None and name != "return_dict"]:
            raise ValueError(f"{', '.join(unknown)}: not taken in pretraining; call the encoder for these")
        batch = len(input_values)
        features, target = self.read(input_values)
        corruption = self.draw_corruption(batch, features.shape[1], seed)
        corrupted = corruption.apply(features, self.config)
        hidden = self.base_model.contextualize(corrupted, places=corruption.places).last_hidden_state
        loss, mean_loss = self.score(hidden, take_frames(target, corruption.places))
        return ReconstructionOutput(
            loss=loss,
            num_targets=corruption.places.numel(),
            num_frames=batch * features.shape[1],
            metrics={"reconstruction_loss": loss.detach(), "mean_predictor_loss": mean_loss},
        )

    @torch.no_grad()
    def training_examples(self, input_values: torch.Tensor, seed: int | None = None) -> dict:
        """The first window for a figure: its mel bands with the chosen frames hidden, what the model makes of all of
        it, and the target, (frames, bands) each; which are chosen (frames,) bool; and the seconds of a frame.

        Shown is the commonest of the three cases: chosen frames set to 0. Deltas are left out.
        """
        training = self.training
        self.eval()
        features, target = self.read(input_values[:1])
        corruption = self.draw_corruption(1, features.shape[1], seed)
        corruption.is_zeroed.fill_(True)
        corrupted = corruption.apply(features, self.config)
        prediction = self.head(self.base_model.contextualize(corrupted).last_hidden_state)
        self.train(training)
        chosen = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
        chosen = chosen.scatter_(1, corruption.places, True)[0].repeat_interleave(self.config.frame_stacking)
        shown = {"input": corrupted, "prediction": prediction.float(), "target": target}
        return {
            **{name: self.unstack(frames, name).cpu().numpy() for name, frames in shown.items()},
            "chosen": chosen.cpu().numpy(),
            "hop_seconds": self.config.hop / self.config.sampling_rate,
        }

    def unstack(self, frames: torch.Tensor, name: str) -> torch.Tensor:
        """(1, frames, ...) of the model -> (frames, bands) of the front end, without deltas."""
        frames = frames[0].unflatten(-1, (self.config.frame_stacking, -1)).flatten(0, 1)
        is_linear = self.config.target == "linear" and name != "input"
        return frames if is_linear else frames[:, : self.config.num_mel_bands]

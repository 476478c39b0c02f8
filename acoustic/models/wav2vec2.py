"""wav2vec 2.0 (Baevski 2020, arXiv 2006.11477): transformers' parameters and checkpoints, and a forward of our own."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.wav2vec2 import modeling_wav2vec2

from acoustic.models.contrastive import Targets, contrastive_logits, count_correct, draw_targets
from acoustic.models.conv_encoder import encode_audio, frames_after
from acoustic.models.fast_modules import use_fast_modules
from acoustic.models.gradients import leave_out, scale_gradient
from acoustic.models.masking import count_masked, draw_span_mask
from acoustic.models.quantizers import GUMBEL_OPTIONS, count_codes

METRICS = (
    "contrastive_loss",
    "diversity_loss",
    "accuracy",
    "code_perplexity",
    "lowest_group_perplexity",
    "prob_perplexity",
)


@dataclass
class Wav2Vec2ForPreTrainingOutput(modeling_wav2vec2.Wav2Vec2ForPreTrainingOutput):
    """transformers' output. Losses are sums over `num_targets` masked frames; `metrics` are detached sums likewise."""

    num_targets: int | None = None
    num_frames: int | None = None
    metrics: dict | None = None


class StableEncoder(modeling_wav2vec2.Wav2Vec2EncoderStableLayerNorm):
    """transformers' encoder under another name.

    Under FSDP accelerate takes a module that is called a norm for the last one before the head, and shards it by
    itself. What is gathered when an encoder is called would then stay sharded: we call its parts.
    """


class Wav2Vec2ForPreTraining(transformers.Wav2Vec2ForPreTraining):
    """Parameters and checkpoint of transformers' class of this name; `forward` does only what the loss needs.

    What it differs in: the convs are matrix products (conv_encoder.py); masked frames alone are quantized, projected
    and scored; masks and negatives are drawn on the device, in numbers known beforehand, so that nothing waits for it.

    Beside transformers', it reads from its config (each a neutral value where the config has none):
        negatives_from: "masked", "utterance" or "batch", see `draw_targets`.
        feature_grad_mult: the factor on the gradient into the convs (fairseq: .1 for base, 1 for large).
        feature_penalty_weight: times the mean square of the convs' output, added to the loss of each target
            (fairseq: 10 for base, 0 for large).
    """

    family = "contrastive"
    normalizes_audio = anneals = True
    # Options of a run that this objective has, and which of them its config keeps.
    config_options = (
        "mask_time_prob",
        "mask_time_length",
        "negatives_from",
        "feature_grad_mult",
        "feature_penalty_weight",
    )
    options = (*config_options, *GUMBEL_OPTIONS, "recompute_convs")
    # The pretraining task masks by itself; a checkpoint's fine-tuning settings must not add to that or switch it off.
    pretraining_config = {
        "apply_spec_augment": True,
        "mask_time_prob": 0.65,
        "mask_time_length": 10,
        "mask_feature_prob": 0.0,
        "add_adapter": False,
    }
    recompute_convs = False

    def __init__(self, config):
        super().__init__(config)
        use_fast_modules(self)
        # What FSDP gathers at a time; transformers names no layer of this model.
        self._no_split_modules = [type(self.wav2vec2.encoder.layers[0]).__name__]
        if type(self.wav2vec2.encoder) is modeling_wav2vec2.Wav2Vec2EncoderStableLayerNorm:
            self.wav2vec2.encoder.__class__ = StableEncoder

    def get_input_embeddings(self) -> None:
        """Audio has no table of tokens; transformers' own answer is an error, and accelerate asks under FSDP."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        penalised = getattr(self.config, "feature_penalty_weight", 0.0) > 0
        return (*METRICS, "feature_penalty") if penalised else METRICS

    @property
    def codes(self) -> tuple[int, int]:
        """(groups, entries of each)."""
        return self.config.num_codevector_groups, self.config.num_codevectors_per_group

    @staticmethod
    def paper_settings(config) -> dict:
        """As fairseq trained the released checkpoints: base has a group norm in its convs, large has layer norms."""
        if config.feat_extract_norm == "group":
            return {"feature_grad_mult": 0.1, "feature_penalty_weight": 10.0}
        return {"feature_grad_mult": 1.0, "feature_penalty_weight": 0.0}

    def count_targets(self, batch: int, samples: int) -> int:
        """How many frames are masked in a batch of that shape; no drawing needed to tell."""
        return batch * count_masked(self.count_frames(samples), *self.mask_settings)

    def count_frames(self, samples: int) -> int:
        return frames_after(self.wav2vec2.feature_extractor.conv_layers, samples)[-1]

    @property
    def mask_settings(self) -> tuple[float, int, int]:
        return self.config.mask_time_prob, self.config.mask_time_length, self.config.mask_time_min_masks

    def draw_targets(self, batch: int, samples: int, seed: int) -> Targets:
        """Masked frames and negatives for a (batch, samples) input, drawn on the model's device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        mask, places = draw_span_mask(batch, self.count_frames(samples), *self.mask_settings, generator)
        negatives_from = getattr(self.config, "negatives_from", "masked")
        return draw_targets(mask, places, self.config.num_negatives, negatives_from, generator)

    def draw_mask(self, batch: int, samples: int, seed: int) -> torch.Tensor:
        """Which frames the transformer doesn't see, as in training: (batch, frames) bool."""
        return self.draw_targets(batch, samples, seed).mask

    def choose_targets(
        self, input_values, attention_mask, mask_time_indices, sampled_negative_indices, seed: int | None
    ) -> Targets:
        """Those that `forward` was given, else drawn from the seed."""
        if (mask_time_indices is None) != (sampled_negative_indices is None):
            raise ValueError(
                "mask_time_indices and sampled_negative_indices: give both, or neither to have them drawn"
            )
        if mask_time_indices is not None:
            return Targets.given(mask_time_indices, sampled_negative_indices)
        if attention_mask is not None:
            raise ValueError("attention_mask: what is padded needs mask_time_indices that leave the padding out")
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        return self.draw_targets(*input_values.shape, seed)

    def set_gumbel_temperature(self, temperature: float) -> None:
        """As a tensor, so that annealing it neither recompiles a graph nor waits for the device."""
        if not isinstance(self.quantizer.temperature, torch.Tensor):
            self.quantizer.temperature = torch.tensor(float(temperature))
        if self.quantizer.temperature.device != self.device:
            self.quantizer.temperature = self.quantizer.temperature.to(self.device)
        self.quantizer.temperature.fill_(temperature)

    def compile_regions(self, **options) -> None:
        """`torch.compile` for each transformer layer (one graph serves all of them) and for the loss.

        What lies between stays Python: which layers are dropped, and the convs, whose products a compiler leaves as
        they are. options: of `torch.compile`.
        """
        for layer in self.wav2vec2.encoder.layers:
            layer.compile(**options)
        self.contrast = torch.compile(self.contrast, **options)

    def encode(self, audio, attention_mask, mask, kept_layers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, frames, ...) each: the transformer's output, the normalised features, the convs' output."""
        model, config = self.wav2vec2, self.config
        raw = encode_audio(model.feature_extractor, audio, self.recompute_convs and self.training)
        raw = scale_gradient(raw, getattr(config, "feature_grad_mult", 1.0))
        hidden, features = model.feature_projection(raw)
        # Not by an indexed assignment, as in transformers, which waits for the device to count the places.
        hidden = torch.where(mask[..., None], model.masked_spec_embed.to(hidden.dtype), hidden)
        if attention_mask is not None:
            attention_mask = self._get_feature_vector_attention_mask(hidden.shape[1], attention_mask)
            hidden = hidden * attention_mask[..., None].to(hidden.dtype)
        hidden = self.transform(model.encoder, hidden, attention_mask, kept_layers)
        return hidden, features, raw

    def transform(self, encoder, hidden, attention_mask, kept_layers) -> torch.Tensor:
        """transformers' `Wav2Vec2Encoder` or its stable-layer-norm twin; without padding no mask, so fused attention.

        A layer that is left out stays in the graph with gradients of zero, so that DDP waits for none of them.
        """
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=attention_mask
        )
        hidden = hidden + encoder.pos_conv_embed(hidden)
        if not self.config.do_stable_layer_norm:
            hidden = encoder.layer_norm(hidden)
        hidden = encoder.dropout(hidden)
        for index, layer in enumerate(encoder.layers):
            if kept_layers is None or kept_layers[index]:
                hidden = layer(hidden, attention_mask=attention_mask)
            else:
                hidden = leave_out(layer, hidden)
        return encoder.layer_norm(hidden) if self.config.do_stable_layer_norm else hidden

    def draw_kept_layers(self, generator: torch.Generator | None = None) -> tuple[bool, ...]:
        """Layerdrop (Fan 2019, arXiv 1909.11556), decided on the CPU: True for a layer that is not left out."""
        drawn = torch.rand(len(self.wav2vec2.encoder.layers), generator=generator)
        return tuple((drawn >= self.config.layerdrop).tolist())

    def quantize(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gumbel-softmax product quantization, straight-through in training and argmax in evaluation (section 3.2).

        Args:
            features: (..., conv channels).

        Returns:
            codevectors (..., codevector_dim); the codes chosen (..., groups) int; the logits (..., groups, entries).
        """
        quantizer = self.quantizer
        logits = quantizer.weight_proj(features).float()
        logits = logits.unflatten(-1, (quantizer.num_groups, quantizer.num_vars))
        if self.training:
            choice = F.gumbel_softmax(logits, tau=quantizer.temperature, hard=True)
        else:
            choice = one_hot_of_largest(logits)
        codebooks = quantizer.codevectors.view(quantizer.num_groups, quantizer.num_vars, -1)
        codevectors = torch.einsum("...gv,gvd->...gd", choice.type_as(codebooks), codebooks).flatten(-2)
        return codevectors, choice.argmax(-1), logits

    @torch.no_grad()
    def code_usage(self, input_values: torch.Tensor) -> torch.Tensor:
        """How often each code is the likeliest, over all frames: (groups, entries) int64."""
        raw = encode_audio(self.wav2vec2.feature_extractor, input_values)
        features = self.wav2vec2.feature_projection(raw)[1]
        logits = self.quantizer.weight_proj(features).unflatten(-1, self.codes)
        return count_codes(logits.argmax(-1), self.codes[1])

    def contrast(self, hidden: torch.Tensor, features: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, dict]:
        """The losses and counts on masked frames; hidden, features: (batch, frames, ...)."""
        predictions = self.project_hid(hidden.flatten(0, 1)[targets.predicted])
        candidates = self.dropout_features(features.flatten(0, 1)[targets.candidates])
        codevectors, codes, code_logits = self.quantize(candidates)
        candidates = self.project_q(codevectors.to(self.project_q.weight.dtype))
        logits = contrastive_logits(
            predictions, candidates, codes, targets, self.config.contrastive_logits_temperature
        )
        first = torch.zeros(len(targets), dtype=torch.int64, device=logits.device)
        contrastive_loss = F.cross_entropy(logits.flatten(0, 1), first, reduction="sum")
        if targets.candidates is not targets.predicted:
            code_logits = code_logits[torch.arange(len(code_logits), device=logits.device)[:, None], targets.positives]
        code_logits = code_logits.flatten(0, 1)
        prob_perplexity = group_perplexities(code_logits.softmax(-1)).sum()
        chosen = group_perplexities(one_hot_of_largest(code_logits.detach()))
        counts = {
            "accuracy": count_correct(logits.detach()),
            "code_perplexity": chosen.sum(),
            "lowest_group_perplexity": chosen.amin(),
        }
        return contrastive_loss, prob_perplexity, counts

    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        mask_time_indices: torch.Tensor | None = None,
        sampled_negative_indices: torch.Tensor | None = None,
        seed: int | None = None,
        kept_layers: tuple[bool, ...] | None = None,
        **kwargs,
    ) -> Wav2Vec2ForPreTrainingOutput:
        """The contrastive task of section 3.2.

        Args:
            input_values: (batch, samples) float32.
            attention_mask: (batch, samples), 0 where padded; needs given masks, which leave the padding out.
            mask_time_indices, sampled_negative_indices: (batch, frames) bool and (batch, frames, negatives) int64 into
                the flattened (batch * frames), as in transformers. Without them both are drawn here, from `seed`.
            seed: of what is drawn; without one it is drawn from torch's CPU generator.
            kept_layers: False for each transformer layer to leave out; without it, drawn by `config.layerdrop`.
        """
        neutral = {name for name, value in kwargs.items() if value is None or value is False}
        if unknown := sorted(kwargs.keys() - neutral - {"return_dict"}):
            raise ValueError(f"{', '.join(unknown)}: not given here; call the encoder, model.wav2vec2(...), for these")
        targets = self.choose_targets(input_values, attention_mask, mask_time_indices, sampled_negative_indices, seed)
        if self.training and kept_layers is None and self.config.layerdrop > 0:
            kept_layers = self.draw_kept_layers()

        hidden, features, raw = self.encode(
            input_values, attention_mask, targets.mask, kept_layers if self.training else None
        )
        contrastive_loss, prob_perplexity, counts = self.contrast(hidden, features, targets)

        total = self.config.num_codevector_groups * self.config.num_codevectors_per_group
        # transformers' definition: of the softmax in training, of the codes chosen in evaluation.
        used = prob_perplexity if self.training else counts["code_perplexity"]
        diversity_loss = (total - used) / total * len(targets)
        loss = contrastive_loss + self.config.diversity_loss_weight * diversity_loss
        metrics = {
            "contrastive_loss": contrastive_loss.detach(),
            "diversity_loss": diversity_loss.detach(),
            "accuracy": counts["accuracy"],
            "code_perplexity": counts["code_perplexity"] * len(targets),
            "lowest_group_perplexity": counts["lowest_group_perplexity"] * len(targets),
            "prob_perplexity": prob_perplexity.detach() * len(targets),
        }
        if weight := getattr(self.config, "feature_penalty_weight", 0.0):
            penalty = raw.float().square().mean() * len(targets)
            loss = loss + weight * penalty
            metrics["feature_penalty"] = penalty.detach()
        return Wav2Vec2ForPreTrainingOutput(
            loss=loss,
            codevector_perplexity=used,
            contrastive_loss=contrastive_loss,
            diversity_loss=diversity_loss,
            num_targets=len(targets),
            num_frames=targets.mask.numel(),
            metrics=metrics,
        )


def one_hot_of_largest(logits: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


def group_perplexities(probs: torch.Tensor) -> torch.Tensor:
    """exp(entropy) of the mean distribution over masked frames, (groups,); probs: (masked, groups, V)."""
    marginal = probs.mean(0)
    # A code that is never likely, as in a collapse, adds 0; the gradient of its logarithm would be 0 / 0.
    return torch.exp(-torch.xlogy(marginal, marginal.clamp_min(torch.finfo(marginal.dtype).tiny)).sum(-1))

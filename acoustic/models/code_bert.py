"""A BERT on the codes of a frozen vq-wav2vec (Baevski 2019, arXiv 1910.05453, sections 3.3 and 5.3): its second stage.

The codes of a frame's groups together are one word; spans of words are hidden, and RoBERTa names them.
"""

import functools
import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel, RobertaConfig, RobertaModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from acoustic.models.cpu import use_cpu_kernels
from acoustic.models.encoder import AudioEncoder
from acoustic.models.heads import EncoderConfig
from acoustic.models.masking import count_masked, draw_span_mask
from acoustic.models.quantizers import code_metrics, count_codes
from acoustic.models.reconstruction import check_share
from acoustic.models.vq_wav2vec import VQWav2VecConfig, VQWav2VecModel, init_vq_weights, make_quantizer
from acoustic.models.wave_encoder import WaveEncoder, check_at_least_1

# The first words of the vocabulary. RoBERTa counts positions from behind the padding word.
MASK, PAD, NUM_SPECIAL = 0, 1, 2
LARGEST_VOCABULARY = 250_000
# RoBERTa's: of the hidden frames so many show the mask, so many another word, and the rest what they are.
SHOWN_AS_MASK, SHOWN_AS_ANOTHER = 0.8, 0.1


@strict
class CodeBertConfig(EncoderConfig):
    """Defaults are RoBERTa base's. Names of the transformer's values are those of `RobertaConfig`.

    Args:
        quantizer: values of the `VQWav2VecConfig` whose codes are read.
        max_frames: longest sequence of the transformer; longer ones are cut into equal parts, each read by itself.
        mask_time_prob, mask_time_length: sum of the hidden spans' lengths over frames, and their length: .5 / 10 is
            the paper's probability .05 of a frame to begin one.
    """

    model_type = "code_bert"

    quantizer: dict | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float | int = 1e-5
    max_frames: int = 2048
    mask_time_prob: float | int = 0.5
    mask_time_length: int = 10

    def __post_init__(self, **kwargs):
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_frames")
        check_at_least_1(self, *names, "mask_time_length")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r}: transformers has no such activation")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "mask_time_prob"):
            check_share(name, getattr(self, name))
        if self.quantizer is not None and self.num_words > LARGEST_VOCABULARY:
            raise ValueError(
                f"the quantizer's {self.codes.num_codevectors_per_group} entries in each of "
                f"{self.codes.num_codevector_groups} groups make {self.num_words:,} words; at most "
                f"{LARGEST_VOCABULARY:,} are possible: take a quantizer with fewer"
            )
        super().__post_init__(**kwargs)

    @property
    def codes(self) -> VQWav2VecConfig:
        if self.quantizer is None:
            raise ValueError("code_bert needs a quantizer: the config of a vq_wav2vec model")
        return config_of_codes(json.dumps(self.quantizer))

    @property
    def num_words(self) -> int:
        return NUM_SPECIAL + self.codes.num_codevectors_per_group**self.codes.num_codevector_groups

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples from one frame to the next."""
        return self.codes.inputs_to_logits_ratio

    def of_transformer(self) -> RobertaConfig:
        return RobertaConfig(
            vocab_size=self.num_words,
            pad_token_id=PAD,
            max_position_embeddings=self.max_frames + NUM_SPECIAL,
            type_vocab_size=1,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            hidden_act=self.hidden_act,
            hidden_dropout_prob=self.hidden_dropout_prob,
            attention_probs_dropout_prob=self.attention_probs_dropout_prob,
            layer_norm_eps=self.layer_norm_eps,
            initializer_range=self.initializer_range,
            use_cache=False,
        )


@functools.lru_cache(maxsize=8)
def config_of_codes(values: str) -> VQWav2VecConfig:
    """From JSON. Asked for in every step, and a config takes its time to check what it is given."""
    return VQWav2VecConfig(**json.loads(values))


class CodeReader(nn.Module):
    """The convs and the quantizer of a vq_wav2vec, frozen."""

    def __init__(self, config: VQWav2VecConfig):
        super().__init__()
        self.encoder, self.quantizer = WaveEncoder(config), make_quantizer(config)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, samples) -> codes (batch, frames, groups) int64."""
        with torch.autocast(input_values.device.type, enabled=False):
            features, real = self.encoder(input_values.float(), attention_mask), None
            if attention_mask is not None:
                real = self.encoder.frame_mask(features.shape[1], attention_mask)
            return self.quantizer(features, real).codes


class CodeBertPreTrainedModel(PreTrainedModel):
    config_class = CodeBertConfig
    base_model_prefix = "code_bert"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RobertaLayer"]  # what FSDP gathers at a time
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["reader"]  # rounding would change codes

    def _init_weights(self, module) -> None:
        init_vq_weights(module)
        if isinstance(module, CodeHead):
            init.zeros_(module.bias)
        elif isinstance(module, CodeBertForPreTraining):
            init.zeros_(module.word_counts)
        elif not isinstance(module, nn.Conv1d):
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """transformers' loading leaves every parameter trainable; what reads the codes never is."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.base_model.reader.requires_grad_(False)
        return loaded

    def get_input_embeddings(self) -> None:
        """Audio has no table of tokens; that of the codes belongs to the transformer."""


class CodeBertModel(AudioEncoder, CodeBertPreTrainedModel):
    """The encoder: `extract_features`, the codes' vectors, then `contextualize`, RoBERTa's layers."""

    # Never trained, and part of what goes in: a control with random weights keeps it.
    frozen_parts = ("reader",)

    def __init__(self, config):
        super().__init__(config)
        self.reader = CodeReader(config.codes)
        self.transformer = RobertaModel(config.of_transformer(), add_pooling_layer=False)
        self.transformer._no_split_modules = ["RobertaLayer"]  # the words are looked up outside of their layer, too
        use_cpu_kernels(self.transformer)
        self.post_init()

    @property
    def front_end(self) -> nn.Module:
        return self.reader.encoder

    @property
    def words(self) -> nn.Embedding:
        return self.transformer.embeddings.word_embeddings

    def read(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None):
        """(batch, samples) -> words (batch, frames) int64, and the codes (batch, frames, groups) they are made of."""
        codes = self.reader(input_values, attention_mask)
        entries, words = self.config.codes.num_codevectors_per_group, 0
        for group in codes.unbind(-1):
            words = words * entries + group
        return words + NUM_SPECIAL, codes

    def extract_features(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, samples) float32, and 0 where padded on the right -> (batch, frames, hidden_size)."""
        return self.words(self.read(input_values, attention_mask)[0])

    def contextualize(
        self, features: torch.Tensor, frame_mask: torch.Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutput:
        """
        Args:
            features: (batch, frames, hidden_size).
            frame_mask: (batch, frames) bool, False for padding; None where there is none.
        """
        frames, places = features.shape[1], None
        if frames > self.config.max_frames:
            features, frame_mask, places = cut(features, frame_mask, self.config.max_frames)
            if frame_mask is not None:
                # In the layers' own shape: into another transformers looks for padding, which waits for the device.
                frame_mask = frame_mask[:, None, None]
        output = self.transformer(
            inputs_embeds=features, attention_mask=frame_mask, output_hidden_states=output_hidden_states
        )
        states = [output.last_hidden_state, *(output.hidden_states or ())]
        if places is not None:
            states = [put_together(state, places) for state in states]
        return BaseModelOutput(states[0], tuple(states[1:]) if output_hidden_states else None)

    def freeze_feature_encoder(self) -> None:
        """What reads the codes is always frozen."""

    def compile_regions(self, **options) -> None:
        for layer in self.transformer.encoder.layer:
            layer.compile(**options)


def cut(
    features: torch.Tensor, frame_mask: torch.Tensor | None, longest: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Each row into equal parts of its own frames, at most `longest`: what it is padded to doesn't matter.

    Returns:
        the parts (batch * parts, size, width); their frame mask (batch * parts, size), None where nothing is padded;
        and the places of the frames in them, (batch, frames) into the parts of a row one after the other.
    """
    batch, frames, width = features.shape
    parts = -(-frames // longest)
    times = torch.arange(frames, device=features.device).expand(batch, -1)
    if frame_mask is None and frames % parts == 0:
        return features.reshape(batch * parts, -1, width), None, times
    if frame_mask is None:
        size = -(-frames // parts)
        frame_mask = torch.ones_like(times, dtype=torch.bool)
    else:
        size = longest  # of the longest part; what that has, only the device knows
    lengths = frame_mask.sum(1, keepdim=True).clamp(min=1)
    own_size = -(-lengths // -(-lengths // longest))
    # Padding goes behind the last part, and is cut off.
    places = torch.where(frame_mask.bool(), times // own_size * size + times % own_size, parts * size)
    rows = features.new_zeros(batch, parts * size + 1, width)
    rows = rows.scatter(1, places[..., None].expand(-1, -1, width), features)[:, :-1]
    real = torch.zeros(batch, parts * size + 1, dtype=torch.bool, device=rows.device)
    real = real.scatter(1, places, True)[:, :-1].reshape(batch * parts, size)
    # Where all of a part is padding, attention would have nothing to look at.
    real = real | ~real.any(1, keepdim=True)
    return rows.reshape(batch * parts, size, width), real, places.clamp(max=parts * size - 1)


def put_together(parts: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The reverse of `cut`: (batch * parts, size, width), (batch, frames) -> (batch, frames, width)."""
    rows = parts.reshape(len(places), -1, parts.shape[2])
    return rows.gather(1, places[..., None].expand(-1, -1, parts.shape[2]))


class CodeHead(nn.Module):
    """RoBERTa's for masked words: a layer, and the words' own vectors as the output's."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.num_words))

    def forward(self, hidden: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (..., words)."""
        return F.linear(self.layer_norm(F.gelu(self.dense(hidden))), words, self.bias.to(words.dtype))


@dataclass
class CodeBertForPreTrainingOutput(ModelOutput):
    """The loss is a sum over `num_targets` hidden frames; so are the `metrics`, detached."""

    loss: torch.Tensor | None = None
    num_targets: int | None = None
    num_frames: int | None = None
    metrics: dict | None = None


class CodeBertForPreTraining(CodeBertPreTrainedModel):
    """Naming hidden words: cross-entropy over all words, on hidden frames only, which alone go through the head."""

    family = "codes"
    normalizes_audio = False
    config_options = ("mask_time_prob", "mask_time_length")
    options = (*config_options, "quantizer_name_or_path")
    # A fine-tuned checkpoint has those of its SpecAugment.
    pretraining_config = {"mask_time_prob": 0.5, "mask_time_length": 10}
    metric_names = ("accuracy", "unigram_loss", "code_perplexity", "lowest_group_perplexity")

    def __init__(self, config):
        super().__init__(config)
        self.code_bert = CodeBertModel(config)
        self.head = CodeHead(config)
        # How often each word was heard in training: what one would go by who knows only that.
        # Whole numbers, which neither stop growing at 2^24 nor are rounded with a model in half precision.
        self.register_buffer("word_counts", torch.zeros(config.num_words, dtype=torch.int64))
        self.post_init()

    @classmethod
    def from_quantizer(cls, vq_model: VQWav2VecModel, overrides: dict) -> "CodeBertForPreTraining":
        """A fresh transformer on the codes of a trained vq_wav2vec."""
        model = cls(CodeBertConfig(quantizer=vq_model.config.to_diff_dict(), **overrides))
        model.code_bert.reader.encoder.load_state_dict(vq_model.encoder.state_dict())
        model.code_bert.reader.quantizer.load_state_dict(vq_model.quantizer.state_dict())
        return model

    @property
    def codes(self) -> tuple[int, int]:
        """(groups, entries of each)."""
        return self.config.codes.num_codevector_groups, self.config.codes.num_codevectors_per_group

    @property
    def mask_settings(self) -> tuple[float, int, int]:
        return self.config.mask_time_prob, self.config.mask_time_length, 1

    def count_frames(self, samples: int) -> int:
        return self.code_bert._get_feat_extract_output_lengths(samples)

    def count_targets(self, rows: int, samples: int) -> int:
        frames = self.count_frames(samples)
        return rows * count_masked(frames, *self.mask_settings) if frames > 1 else 0

    def draw_mask(self, batch: int, samples: int, seed: int) -> torch.Tensor:
        """Which words are to be guessed, as in training: (batch, frames) bool."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return draw_span_mask(batch, self.count_frames(samples), *self.mask_settings, generator)[0]

    def compile_regions(self, **options) -> None:
        self.code_bert.compile_regions(**options)

    def hide(self, words: torch.Tensor, seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(words with some hidden, (batch, hidden) places of those); words: (batch, frames)."""
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        generator = torch.Generator(words.device).manual_seed(seed)
        _, places = draw_span_mask(*words.shape, *self.mask_settings, generator)
        die = torch.rand(places.shape, generator=generator, device=words.device)
        another = torch.randint(
            NUM_SPECIAL, self.config.num_words, places.shape, generator=generator, device=words.device
        )
        shown = words.gather(1, places)
        shown = torch.where(die < SHOWN_AS_MASK + SHOWN_AS_ANOTHER, another, shown)
        shown = torch.where(die < SHOWN_AS_MASK, MASK, shown)
        return words.scatter(1, places, shown), places

    def forward(self, input_values: torch.Tensor, seed: int | None = None) -> CodeBertForPreTrainingOutput:
        """
        Args:
            input_values: (batch, samples) float32, without padding.
            seed: of what is drawn; without one it is drawn from torch's CPU generator.
        """
        if self.count_targets(1, input_values.shape[1]) < 1:
            raise ValueError(f"{input_values.shape[1]} samples are too few for two frames")
        words, codes = self.code_bert.read(input_values)
        hidden_words, places = self.hide(words, seed)
        hidden = self.code_bert.contextualize(self.code_bert.words(hidden_words)).last_hidden_state
        hidden = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2])).flatten(0, 1)
        targets, count = words.gather(1, places).flatten(), places.numel()
        logits = self.head(hidden, self.code_bert.words.weight).float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        metrics = {
            "accuracy": (logits.detach().argmax(-1) == targets).sum(),
            "unigram_loss": self.unigram_loss(words, targets),
            **code_metrics(codes, self.codes[1], count),
        }
        return CodeBertForPreTrainingOutput(loss, count, words.numel(), metrics)

    @torch.no_grad()
    def unigram_loss(self, words: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Nats of the targets, summed, by the frequencies heard so far, one added to each; in training heard now."""
        odds = self.word_counts.float() + 1
        loss = (odds[NUM_SPECIAL:].sum().log() - odds.log()[targets]).sum()
        if self.training:
            heard = words.flatten()
            self.word_counts.scatter_add_(0, heard, torch.ones_like(heard, dtype=self.word_counts.dtype))
        return loss

    def code_usage(self, input_values: torch.Tensor) -> torch.Tensor:
        """How often each code is there: (groups, entries) int64."""
        return count_codes(self.code_bert.reader(input_values), self.codes[1])

"""What every task shares: a head on a pretrained encoder, or on the same architecture with random weights."""

import torch
import transformers

from acoustic.console import UserError
from acoustic.data.headers import Skip
from acoustic.models import load_config, load_feature_extractor, load_weights
from acoustic.models.build import check_rate
from acoustic.models.fast_modules import use_fast_modules
from acoustic.models.heads import EncoderConfig

# fairseq's spans of masked frames: 10 of 20 ms.
SPAN_SECONDS = 0.2


def load_encoder_config(name: str, revision: str | None = None):
    """The checkpoint's config, as it is."""
    config = load_config(name, revision)
    if not hasattr(config, "inputs_to_logits_ratio"):
        raise UserError(f"model_name_or_path: {name!r} is not an encoder of audio waveforms")
    return config


# What tasks choose at their end for their own classes: nothing for the next task that begins with the same model.
CHOSEN_LAST = ("thresholds", "segmentation")


def build_with_head(auto_class, model_args, random_weights: bool, overrides: dict, weighted_layer_sum: bool = False):
    """(model, feature extractor, notes) for a task's Auto class; the feature extractor is always the checkpoint's own.

    `overrides` are the task's settings of the config; the user's `config_overrides` win over them.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    family = load_encoder_config(name, revision)
    if weighted_layer_sum:
        if not hasattr(family, "use_weighted_layer_sum"):
            raise UserError(f"weighted_layer_sum: transformers has none for a {family.model_type} model")
        overrides = {**overrides, "use_weighted_layer_sum": True}
        if hasattr(family, "layerdrop"):  # a dropped layer leaves no output to weigh
            if model_args.config_overrides.get("layerdrop"):
                raise UserError("weighted_layer_sum: needs all layers; leave layerdrop out of config_overrides")
            overrides["layerdrop"] = 0.0
    config = load_config(name, revision, {"problem_type": None, **overrides, **model_args.config_overrides})
    for chosen in CHOSEN_LAST:
        if hasattr(config, chosen):
            delattr(config, chosen)
    feature_extractor = load_feature_extractor(name, revision)
    check_rate(name, config, feature_extractor)
    make = with_random_weights if random_weights else with_pretrained_encoder
    model, notes = make(auto_class, name, revision, config)
    if hasattr(model, "layer_weights"):
        layers = len(model.layer_weights)
        notes.append(f"learned weighted sum over {layers} layers" if layers > 1 else "one layer: nothing to weigh")
    elif weighted_layer_sum:
        raise UserError(
            f"weighted_layer_sum: transformers' {type(model).__name__} has none, so nothing could load what is saved; "
            "its head for classification has one"
        )
    return model, feature_extractor, notes


def with_pretrained_encoder(auto_class, name: str, revision: str | None, config):
    model, info = load_weights(auto_class, name, revision, config, ignore_mismatched_sizes=True)
    missing = missing_weights(info)
    encoder = [key for key in missing if key.startswith(model.base_model_prefix + ".")]
    # masked_spec_embed is only there when a checkpoint was trained with masks.
    refuse_lost(name, [key for key in encoder if not key.endswith("masked_spec_embed")])
    if "layer_weights" in missing:
        # Equal. (transformers leaves its own as the memory was.)
        torch.nn.init.zeros_(model.layer_weights)
    fresh = sorted({key.split(".")[0] for key in missing if key not in encoder})
    notes = [f"model: encoder from {name}"]
    if fresh:
        notes.append(f"new head with random weights: {', '.join(fresh)}")
    return model, notes


def with_random_weights(auto_class, name: str, revision: str | None, config):
    """The control. What no training changes belongs to the input, not to the weights: it stays the checkpoint's."""
    try:
        model = auto_class.from_config(config)
    except ValueError as error:
        raise UserError(f"model_name_or_path: {name!r}: {str(error).splitlines()[0][:300]}") from None
    use_fast_modules(model)
    notes = [f"model: the architecture of {name} with random weights (the control)"]
    if parts := getattr(model.base_model, "frozen_parts", ()):
        trained, info = load_weights(transformers.AutoModel, name, revision, config, ignore_mismatched_sizes=True)
        refuse_lost(
            name, [key for key in missing_weights(info) if key.startswith(tuple(f"{part}." for part in parts))]
        )
        for part in parts:
            model.base_model.get_submodule(part).load_state_dict(trained.get_submodule(part).state_dict())
        notes.append(f"never trained, so kept from {name}: {', '.join(parts)}")
    return model, notes


def missing_weights(info: dict) -> list[str]:
    """Names of the weights that a checkpoint lacks, or has in another size."""
    return sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})


def refuse_lost(name: str, lost: list[str]) -> None:
    if lost:
        raise UserError(
            f"model_name_or_path: {name!r} lacks weights of the encoder, or has them in another size: "
            f"{', '.join(lost[:3])}, ..."
        )


def masking_overrides(config, time: float, channel: float) -> dict:
    """SpecAugment of fairseq's few-label configs: spans of 0.2 s, and of a twelfth of the channels (64 of 768)."""
    frame_seconds = config.inputs_to_logits_ratio / getattr(config, "sampling_rate", 16_000)
    channels = getattr(config, "feature_size", config.hidden_size)
    return {
        "apply_spec_augment": True,
        "mask_time_prob": time,
        "mask_time_length": max(round(SPAN_SECONDS / frame_seconds), 1),
        "mask_feature_prob": channel,
        "mask_feature_length": max(channels // 12, 1),
    }


def mask_length(config) -> int:
    """Frames that a clip must have more of in training, because of masked spans; 0 where it need not."""
    if isinstance(config, EncoderConfig):  # our heads leave a clip as it is rather than hide all of it
        return 0
    return config.mask_time_length if config.apply_spec_augment and config.mask_time_prob > 0 else 0


def refuse_unusable(frames: int, length: int = 0) -> None:
    """A clip shorter than a frame; and in one not longer than a masked span transformers draws none, but raises."""
    if frames < 1:
        raise Skip("shorter than one frame of the model")
    if frames <= length:
        raise Skip(f"its {frames} frames are too few for masked spans of {length} (mask_time_length)")


def name_some(names, limit: int = 5) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")

"""What every task shares: a head on a pretrained encoder, or on the same architecture with random weights."""

from acoustic.console import UserError
from acoustic.data.headers import Skip
from acoustic.models import load_config, load_feature_extractor, load_weights


def build_with_head(auto_class, model_args, random_weights: bool, overrides: dict):
    """(model, feature extractor, notes) for a task's Auto class; the feature extractor is always the checkpoint's own.

    `overrides` are the task's settings of the config; the user's `config_overrides` win over them.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if not hasattr(load_config(name, revision), "inputs_to_logits_ratio"):
        raise UserError(f"model_name_or_path: {name!r} is not an encoder of audio waveforms")
    config = load_config(name, revision, {**overrides, **model_args.config_overrides})
    feature_extractor = load_feature_extractor(name, revision)
    if random_weights:
        model = auto_class.from_config(config)
        return model, feature_extractor, [f"model: the architecture of {name} with random weights (the control)"]
    model, info = load_weights(auto_class, name, revision, config, ignore_mismatched_sizes=True)
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    encoder = [key for key in sorted(missing) if key.startswith(model.base_model_prefix + ".")]
    # masked_spec_embed is only there when a checkpoint was trained with masks.
    lost = [key for key in encoder if not key.endswith("masked_spec_embed")]
    if lost:
        raise UserError(
            f"model_name_or_path: {name!r} lacks weights of the encoder, or has them in another size: "
            f"{', '.join(lost[:3])}, ..."
        )
    fresh = sorted({key.split(".")[0] for key in missing if key not in encoder})
    notes = [f"model: encoder from {name}"]
    if fresh:
        notes.append(f"new head with random weights: {', '.join(fresh)}")
    return model, feature_extractor, notes


def masking_overrides(model_args, time: float, channel: float) -> dict:
    """SpecAugment of fairseq's few-label configs; 64 of 768 channels is a twelfth, whatever the width."""
    config = load_config(model_args.model_name_or_path, model_args.model_revision)
    return {
        "apply_spec_augment": True,
        "mask_time_prob": time,
        "mask_time_length": 10,
        "mask_feature_prob": channel,
        "mask_feature_length": max(config.hidden_size // 12, 1),
    }


def mask_length(config) -> int:
    """Frames of a masked span in training; 0 where nothing is masked."""
    return config.mask_time_length if config.apply_spec_augment and config.mask_time_prob > 0 else 0


def refuse_unmaskable(frames: int, length: int) -> None:
    """transformers draws no span in a clip that is not longer than one; it raises."""
    if frames <= length:
        raise Skip(f"its {frames} frames are too few for masked spans of {length} (mask_time_length)")


def name_some(names, limit: int = 5) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")

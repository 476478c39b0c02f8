"""Pretraining objectives by name, and how a model for one is made: from scratch or continued from a checkpoint."""

import contextlib
import difflib
import json

import torch
import transformers

from acoustic.console import UserError
from acoustic.models.wav2vec2 import HEAD_MODULES, Wav2Vec2ForPreTraining

OBJECTIVES = {"wav2vec2": Wav2Vec2ForPreTraining}

# The pretraining task masks by itself; a checkpoint's fine-tuning settings must not add to that or switch it off.
# (Without a mask_time_prob transformers makes no vector for masked frames; the objective's setting comes later.)
PRETRAINING_CONFIG = {
    "apply_spec_augment": True,
    "mask_time_prob": 0.65,
    "mask_feature_prob": 0.0,
    "add_adapter": False,
}


def load_config(name_or_path: str, revision: str | None = None, overrides: dict | None = None):
    """A checkpoint's config with some values changed. Raises `UserError` for a name or value that it doesn't take."""
    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model_name_or_path: no model {name_or_path!r} (neither a local folder with a config.json nor a "
            f"model on the Hub that can be reached from here): {str(error).splitlines()[0][:200]}"
        ) from None
    if not overrides:
        return config
    check_overrides(type(config), overrides)
    with override_errors():
        config = transformers.AutoConfig.from_pretrained(name_or_path, revision=revision, **overrides)
    check_architecture(config)
    return config


def make_config(config_class, overrides: dict):
    """A config of the paper's base size with some values changed."""
    check_overrides(config_class, overrides)
    with override_errors():
        config = config_class(**overrides)
    check_architecture(config)
    return config


def check_overrides(config_class, overrides: dict) -> None:
    known = {*config_class().to_dict(), "num_labels"}
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            raise UserError(
                f"config_overrides: {config_class.__name__} has no {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )


@contextlib.contextmanager
def override_errors():
    """transformers validates its configs with several exception types of its own; each becomes one line."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"config_overrides: {' '.join(lines)[:300]}") from None


def build_for_pretraining(
    objective: str, name_or_path: str | None, revision: str | None, overrides: dict, settings: dict | None = None
) -> tuple[transformers.PreTrainedModel, object, list[str]]:
    """A model for pretraining and its feature extractor: continued from a checkpoint, else a base model from scratch.

    Args:
        overrides: values of the model's config to change.
        settings: the objective's own, which go into the config too. Where one is None it stays what a checkpoint of
            ours was trained with, else it is the paper's.

    Returns:
        (model, feature extractor, notes): the notes say in words what was decided and why.
    """
    settings = settings or {}
    if both := sorted(settings.keys() & overrides.keys()):
        raise UserError(f"config_overrides: {both[0]} is an option of its own: --{both[0]}")
    model, feature_extractor, notes = build(objective, name_or_path, revision, {**PRETRAINING_CONFIG, **overrides})
    open_ = [name for name, value in settings.items() if value is None and not hasattr(model.config, name)]
    papers = {name: model.paper_settings(model.config)[name] for name in open_}
    for name, value in {**settings, **papers}.items():
        if value is not None:
            setattr(model.config, name, value)
    if papers:
        chosen = ", ".join(f"{name} {value:g}" for name, value in papers.items())
        notes.append(f"{chosen}: as the paper trained a model with {model.config.feat_extract_norm} norm in its convs")
    if getattr(model.config, "feature_grad_mult", None) == 0:
        model.freeze_feature_encoder()
    return model, feature_extractor, notes


def build(objective: str, name_or_path: str | None, revision: str | None, overrides: dict):
    model_class = OBJECTIVES[objective]
    if name_or_path is None:
        model = model_class(make_config(model_class.config_class, overrides))
        parameters = sum(p.numel() for p in model.parameters())
        notes = [f"model: {objective} from scratch, {parameters / 1e6:.1f} M parameters"]
        return model, make_feature_extractor(), notes
    family = load_config(name_or_path, revision).model_type
    if family != model_class.config_class.model_type:
        raise UserError(
            f"model_name_or_path: {name_or_path!r} is a {family} checkpoint; objective {objective} continues "
            f"{model_class.config_class.model_type} checkpoints"
        )
    config = load_config(name_or_path, revision, overrides)
    model, info = load_weights(model_class, name_or_path, revision, config)
    fresh = sorted({key.split(".")[0] for key in info["missing_keys"]} & set(HEAD_MODULES))
    notes = [f"model: continued from {name_or_path}"]
    if fresh:
        notes.append(f"the checkpoint has no pretraining head: {', '.join(fresh)} start afresh, with random weights")
    other = sorted(key for key in info["missing_keys"] if key.split(".")[0] not in HEAD_MODULES)
    if other:
        notes.append(f"not in the checkpoint, so random: {', '.join(other[:5])}{', ...' if len(other) > 5 else ''}")
    return model, load_feature_extractor(name_or_path, revision), notes


def check_architecture(config) -> None:
    """What transformers would only find deep inside the model, or not at all."""
    lists = {
        key: len(getattr(config, key)) for key in ("conv_dim", "conv_kernel", "conv_stride") if hasattr(config, key)
    }
    if len(set(lists.values())) > 1:
        raise UserError(
            f"config_overrides: conv_dim, conv_kernel and conv_stride differ in length: {json.dumps(lists)}"
        )
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"config_overrides: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )
    if hasattr(config, "codevector_dim") and config.codevector_dim % config.num_codevector_groups:
        raise UserError(
            f"config_overrides: codevector_dim {config.codevector_dim} is not a multiple of num_codevector_groups "
            f"{config.num_codevector_groups}"
        )
    if hasattr(config, "num_conv_pos_embeddings") and config.hidden_size % config.num_conv_pos_embedding_groups:
        raise UserError(
            f"config_overrides: hidden_size {config.hidden_size} is not a multiple of num_conv_pos_embedding_groups "
            f"{config.num_conv_pos_embedding_groups}"
        )


def load_weights(model_class, name_or_path: str, revision: str | None, config, **kwargs):
    """(model, loading info) through `from_pretrained`; what can't be loaded is one line."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what is missing is said once, by us, in words
    try:
        return model_class.from_pretrained(
            name_or_path, revision=revision, config=config, dtype=torch.float32, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"model_name_or_path: can't load {name_or_path!r}: {' '.join(lines)[:300]}") from None
    finally:
        transformers.logging.set_verbosity(level)


def make_feature_extractor() -> transformers.Wav2Vec2FeatureExtractor:
    """16 kHz, zero mean and unit variance per window, as the released facebook/wav2vec2-base has it."""
    return transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)


def load_feature_extractor(name_or_path: str, revision: str | None = None):
    """The checkpoint's own, because the scaling of the waveform must stay that of its pretraining."""
    try:
        return transformers.AutoFeatureExtractor.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError):
        raise UserError(
            f"model_name_or_path: {name_or_path!r} has no preprocessor_config.json, which says how its audio is "
            "scaled; copy the one of the model that it came from into the folder"
        ) from None

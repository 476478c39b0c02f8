"""How a model for pretraining is made: from scratch, or continued from a checkpoint."""

import contextlib
import json
from pickle import UnpicklingError

import torch
import transformers

from acoustic.console import UserError, did_you_mean, did_you_mean_path, say_asking_the_hub
from acoustic.models.fast_modules import use_fast_modules
from acoustic.models.heads import EncoderConfig
from acoustic.models.registry import OBJECTIVES

# Only numbers and settings are loaded. If this were left out, transformers would ask whoever is at the terminal.
NO_CODE = {"trust_remote_code": False}


def load_config(name_or_path: str, revision: str | None = None, overrides: dict | None = None):
    """A checkpoint's config with some values changed. Raises `UserError` for a name or value that it doesn't take."""
    say_asking_the_hub(name_or_path)
    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path, revision=revision, **NO_CODE)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model_name_or_path: no model {name_or_path!r} (neither a local folder with a config.json nor a "
            f"model on the Hub that can be reached from here): {str(error).splitlines()[0][:200]}"
            f"{did_you_mean_path(name_or_path)}"
        ) from None
    if not overrides:
        return config
    check_overrides(type(config), overrides)
    with override_errors():
        given = config
        config = transformers.AutoConfig.from_pretrained(name_or_path, revision=revision, **NO_CODE, **overrides)
        if isinstance(config, EncoderConfig):
            # transformers sets what is overridden behind the config's own checks.
            known = {name: value for name, value in overrides.items() if name != "num_labels"}
            type(config)(**{**given.to_dict(), **known})
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
            raise UserError(f"config_overrides: {config_class.__name__} has no {key!r}{did_you_mean(key, known)}")


@contextlib.contextmanager
def override_errors():
    """transformers validates its configs with several exception types of its own; each becomes one line."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"config_overrides: {' '.join(lines)[:300]}") from None


def build_for_pretraining(
    objective: str,
    name_or_path: str | None,
    revision: str | None,
    overrides: dict,
    settings: dict | None = None,
    quantizer: str | None = None,
) -> tuple[transformers.PreTrainedModel, object, list[str]]:
    """A model for pretraining and its feature extractor: continued from a checkpoint, else of the paper's size.

    Args:
        overrides: values of the model's config to change.
        settings: those of the run's options that go into the config too. Where one is None it stays what a checkpoint
            of ours was trained with, else it is the paper's. What the objective doesn't have is passed over.
        quantizer: the vq_wav2vec checkpoint that a code_bert from scratch needs.

    Returns:
        (model, feature extractor, notes): the notes say in words what was decided and why.
    """
    model_class = OBJECTIVES[objective]
    settings = {name: value for name, value in (settings or {}).items() if name in model_class.config_options}
    if both := sorted(settings.keys() & overrides.keys()):
        raise UserError(f"config_overrides: {both[0]} is an option of its own: --{both[0]}")
    refuse_unused(objective, overrides)
    ours = name_or_path is not None and was_pretrained(load_config(name_or_path, revision), model_class)
    if not ours:
        overrides = {**model_class.pretraining_config, **overrides}
    if name_or_path is None:
        model, feature_extractor, notes = from_scratch(objective, overrides, quantizer)
    else:
        model, feature_extractor, notes = from_checkpoint(objective, name_or_path, revision, overrides)
    open_ = [name for name, value in settings.items() if value is None and not hasattr(model.config, name)]
    papers = {name: model.paper_settings(model.config)[name] for name in open_}
    for name, value in {**settings, **papers}.items():
        if value is not None:
            setattr(model.config, name, value)
    if ours and (kept := [name for name, value in settings.items() if value is None]):
        chosen = ", ".join(f"{name} {getattr(model.config, name)}" for name in kept)
        notes.append(f"{chosen}: as {name_or_path} was trained")
    if papers:
        chosen = ", ".join(f"{name} {value:g}" for name, value in papers.items())
        notes.append(f"{chosen}: as the paper trained a model with {model.config.feat_extract_norm} norm in its convs")
    if getattr(model.config, "feature_grad_mult", None) == 0:
        model.freeze_feature_encoder()
    return model, feature_extractor, notes


def refuse_unused(objective: str, overrides: dict) -> None:
    """Values that pretraining would save without a look at them.

    Raises:
        UserError: names the first one.
    """
    config_class = OBJECTIVES[objective].config_class
    if "quantizer" in overrides and objective == "code_bert":
        raise UserError("config_overrides: quantizer is that of --quantizer_name_or_path")
    if unused := sorted(heads_settings(config_class) & overrides.keys()):
        raise UserError(
            f"config_overrides: {unused[0]} is for fine-tuning; pretraining of objective {objective} doesn't use it"
        )


def heads_settings(config_class) -> set[str]:
    """Names in our configs that only the heads for fine-tuning read."""
    if not issubclass(config_class, EncoderConfig):
        return set()
    own = config_class.__mro__[: config_class.__mro__.index(EncoderConfig)]
    used = {"initializer_range"}.union(*(vars(base).get("__annotations__", {}) for base in own))
    return set(EncoderConfig.__annotations__) - used


def was_pretrained(config, model_class) -> bool:
    """By us, so that its masks are those it knows; a fine-tuned checkpoint has those of its SpecAugment."""
    known = all(hasattr(config, name) for name in model_class.config_options)
    return known and (config.architectures or [])[:1] == [model_class.__name__]


def from_scratch(objective: str, overrides: dict, quantizer: str | None):
    model_class = OBJECTIVES[objective]
    notes = []
    if objective == "code_bert":
        check_overrides(model_class.config_class, overrides)
        frozen, feature_extractor = load_quantizer(quantizer)
        with override_errors():
            model = model_class.from_quantizer(frozen, overrides)
        notes.append(f"codes: of {quantizer}, which stays as it is")
    else:
        config = make_config(model_class.config_class, overrides)
        with override_errors():
            model = model_class(config)
        feature_extractor = make_feature_extractor(model)
    parameters = sum(p.numel() for p in model.parameters())
    return model, feature_extractor, [f"model: {objective} from scratch, {parameters / 1e6:.1f} M parameters", *notes]


def load_quantizer(name_or_path: str):
    """(frozen model, its feature extractor) of a vq_wav2vec checkpoint."""
    with named("quantizer_name_or_path"):
        config = load_config(name_or_path)
        if config.model_type != "vq_wav2vec":
            raise UserError(
                f"model_name_or_path: {name_or_path!r} is a {config.model_type} checkpoint, not one of vq_wav2vec"
            )
        model, _ = load_weights(transformers.AutoModel, name_or_path, None, config)
        return model, load_feature_extractor(name_or_path)


@contextlib.contextmanager
def named(option: str):
    """Errors about a checkpoint, under the option that it was given by."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("model_name_or_path", option, 1)) from None


def from_checkpoint(objective: str, name_or_path: str, revision: str | None, overrides: dict):
    model_class = OBJECTIVES[objective]
    family = load_config(name_or_path, revision).model_type
    if family != model_class.config_class.model_type:
        others = f"; objective {family} does" if family in OBJECTIVES else ""
        raise UserError(
            f"model_name_or_path: {name_or_path!r} is a {family} checkpoint, which objective {objective} can't "
            f"continue{others}"
        )
    config = load_config(name_or_path, revision, overrides)
    model, info = load_weights(model_class, name_or_path, revision, config, ignore_mismatched_sizes=True)
    if resized := sorted(key for key, *_ in info["mismatched_keys"]):
        raise UserError(
            f"model_name_or_path: {name_or_path!r} has other sizes than config_overrides give ({resized[0]}); a "
            "checkpoint keeps its architecture: leave them out, or start from scratch without model_name_or_path"
        )
    encoder = f"{model.base_model_prefix}."
    missing = sorted(info["missing_keys"])
    head = sorted({key.split(".")[0] for key in missing if not key.startswith(encoder)})
    notes = [f"model: continued from {name_or_path}"]
    if head:
        notes.append(f"the checkpoint has no pretraining head: {', '.join(head)} start afresh, with random weights")
    if other := [key for key in missing if key.startswith(encoder)]:
        notes.append(f"not in the checkpoint, so random: {', '.join(other[:5])}{', ...' if len(other) > 5 else ''}")
    feature_extractor = load_feature_extractor(name_or_path, revision)
    check_rate(name_or_path, config, feature_extractor)
    return model, feature_extractor, notes


def check_rate(name_or_path: str, config, feature_extractor) -> None:
    """A mel front end is made for one rate; what it is fed must have it."""
    rate = getattr(config, "sampling_rate", feature_extractor.sampling_rate)
    if rate != feature_extractor.sampling_rate:
        raise UserError(
            f"model_name_or_path: {name_or_path!r} computes its features at {rate} Hz, and its "
            f"preprocessor_config.json says {feature_extractor.sampling_rate} Hz; copy the one it was trained with"
        )


def check_architecture(config) -> None:
    """What transformers would only find deep inside the model, or not at all."""
    lists = {
        key: len(getattr(config, key)) for key in ("conv_dim", "conv_kernel", "conv_stride") if hasattr(config, key)
    }
    if len(set(lists.values())) > 1:
        raise UserError(
            f"config_overrides: conv_dim, conv_kernel and conv_stride differ in length: {json.dumps(lists)}"
        )
    if config.hidden_size % getattr(config, "num_attention_heads", 1):
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
        options = {"config": config, "dtype": torch.float32, "output_loading_info": True, **NO_CODE, **kwargs}
        model, info = model_class.from_pretrained(name_or_path, revision=revision, **options)
    except UnpicklingError:
        raise UserError(
            f"model_name_or_path: {name_or_path!r} holds more than numbers in its pytorch_model.bin, which could be "
            "code; use a checkpoint with model.safetensors"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"model_name_or_path: can't load {name_or_path!r}: {' '.join(lines)[:300]}") from None
    finally:
        transformers.logging.set_verbosity(level)
    use_fast_modules(model)
    return model, info


def make_feature_extractor(model) -> transformers.Wav2Vec2FeatureExtractor:
    """wav2vec 2.0's scales each window to zero mean and unit variance, as that of facebook/wav2vec2-base does; other
    front ends take the waveform as it is. 16 kHz, or what a mel front end is made for."""
    scaled = getattr(model, "normalizes_audio", True)
    return transformers.Wav2Vec2FeatureExtractor(
        sampling_rate=getattr(model.config, "sampling_rate", 16_000),
        do_normalize=scaled,
        return_attention_mask=not scaled,
    )


def load_feature_extractor(name_or_path: str, revision: str | None = None):
    """The checkpoint's own, because the scaling of the waveform must stay that of its pretraining."""
    try:
        return transformers.AutoFeatureExtractor.from_pretrained(name_or_path, revision=revision, **NO_CODE)
    except (OSError, ValueError):
        raise UserError(
            f"model_name_or_path: {name_or_path!r} has no preprocessor_config.json, which says how its audio is "
            "scaled; copy the one of the model that it came from into the folder"
        ) from None

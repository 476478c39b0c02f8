"""A folder, or a Hub id -> the predictor for what it holds."""

from pathlib import Path

from transformers.utils import cached_file

from acoustic.console import UserError
from acoustic.models import load_config, load_feature_extractor, load_weights
from acoustic.models.build import check_rate
from acoustic.predict.anomalies import load_scorer
from acoustic.predict.classify import Classifier
from acoustic.predict.predictor import Predictor
from acoustic.predict.segment import Segmenter
from acoustic.predict.transcribe import Transcriber
from acoustic.tasks.anomaly import FILE as DETECTOR
from acoustic.tasks.base import load_encoder_config, missing_weights

# By the end of a class's name in transformers: the predictor, and the longest window in seconds where it is not known
# what the model was trained on.
HEADS = {
    "ForSequenceClassification": (Classifier, 10.0),
    "ForAudioFrameClassification": (Segmenter, 10.0),
    "ForCTC": (Transcriber, 30.0),
}


def load_predictor(
    name: str,
    *,
    max_seconds: float | None = None,
    batch_seconds: float | None = None,
    machine: str | None = None,
    machine_by_row: bool = False,
    device="cpu",
) -> Predictor:
    """
    Args:
        name: folder or Hub id of a model with a head, or of an anomaly detector.
        max_seconds: the longest window; default: the one that the model was trained and evaluated on, where its config
            says so (`window_seconds`); else 10 s, for CTC 30 s.
        batch_seconds: audio that is heard together.
        machine: which one is heard, where an anomaly detector knows several.
        machine_by_row: each row says it, as "machine".

    Raises:
        UserError: it can't be loaded, or is an encoder without a head.
    """
    if find_file(name, f"{DETECTOR}.json"):
        if max_seconds is not None:
            raise UserError("max_duration_in_seconds: an anomaly detector's windows are as long as those it knows")
        return load_scorer(name, machine, machine_by_row, batch_seconds, device)
    if machine is not None or machine_by_row:
        raise UserError(f"machine: belongs to an anomaly detector; {name} is none")
    built = next(iter(load_config(name).architectures or ()), "")
    kind, default = next((found for ending, found in HEADS.items() if built.endswith(ending)), (None, 0.0))
    if kind is None:
        raise UserError(
            f"{name} is an encoder without a head: fine-tune it with run_finetune.py, or python -m acoustic.embed "
            "gives its embeddings"
        )
    config, extractor = load_encoder_config(name), load_feature_extractor(name)
    check_rate(name, config, extractor)
    model, info = load_weights(kind.auto_class, name, None, config)
    if lost := [key for key in missing_weights(info) if not key.endswith("masked_spec_embed")]:
        raise UserError(f"{name}: lacks weights, or has them in another size: {', '.join(lost[:3])}, ...")
    seconds = max_seconds or getattr(config, "window_seconds", None) or default
    return kind(name, model.to(device).eval(), extractor, seconds, batch_seconds)


def find_file(name: str, file: str) -> str | None:
    """A file beside a model, local or on the Hub."""
    if Path(name).is_dir():
        return str(Path(name, file)) if Path(name, file).is_file() else None
    try:
        return cached_file(name, file)
    except (OSError, ValueError):
        return None

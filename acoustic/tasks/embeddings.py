"""What a frozen encoder makes of recordings of any length: mean and deviation over time of each layer."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

from acoustic.data.batches import BatchStream
from acoustic.data.collate import extract
from acoustic.data.loader import StreamLoader
from acoustic.data.rows import IndexedRows, Rows
from acoustic.data.tally import Tally
from acoustic.data.windows import Plan, Window, divide_evenly
from acoustic.models import load_feature_extractor, load_weights
from acoustic.models.build import check_rate
from acoustic.models.heads import count_hidden_states
from acoustic.tasks.base import load_encoder_config, missing_weights, refuse_lost, with_random_weights

# Long recordings are read in pieces; attention over half a minute takes little memory.
MAX_SECONDS, BATCH_SECONDS = 30.0, 60.0


@dataclass
class Embeddings:
    """
    names: of the recordings, as the data set has them.
    labels: None where a recording has none.
    values: (recordings, layers, 2 * width) float32, the mean over time and then the deviation of each layer, the input
        of the first one before them.
    skipped: what could not be read, and why.
    """

    names: list[str]
    labels: list
    values: np.ndarray
    skipped: Tally = field(default_factory=Tally)

    def __len__(self) -> int:
        return len(self.names)


class Encoder:
    """An encoder without a head, as it stands: in evaluation, and without gradients.

    Args:
        model: takes input_values, and gives all hidden states.
        extractor: its feature extractor.
    """

    def __init__(self, model, extractor):
        self.model, self.extractor = model, extractor
        self.rate, self.num_layers = extractor.sampling_rate, count_hidden_states(model.config)
        self.frame_seconds = model.config.inputs_to_logits_ratio / self.rate

    @torch.no_grad()
    def layers(self, waveforms: list[np.ndarray]) -> list[torch.Tensor]:
        """Waveforms of any lengths, (samples,) each -> for each of them (layers, frames, width) float32 on the CPU."""
        inputs = extract(self.extractor, waveforms)
        if "attention_mask" not in inputs and len({len(waveform) for waveform in waveforms}) > 1:
            # Without a mask padding would be heard.
            return [layers for waveform in waveforms for layers in self.layers([waveform])]
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        states = self.model(**inputs, output_hidden_states=True).hidden_states
        counts = [int(self.model._get_feat_extract_output_lengths(len(waveform))) for waveform in waveforms]
        stacked = torch.stack(states, 1).float().cpu()
        return [layers[:, :count] for layers, count in zip(stacked, counts)]


def load_encoder(
    name_or_path: str, revision: str | None = None, random_weights: bool = False, device="cpu"
) -> Encoder:
    """Of a checkpoint, pretrained or fine-tuned.

    random_weights: the same architecture at random (the control), drawn from torch's generator.
    """
    config = load_encoder_config(name_or_path, revision)
    extractor = load_feature_extractor(name_or_path, revision)
    check_rate(name_or_path, config, extractor)
    if random_weights:
        model, _ = with_random_weights(transformers.AutoModel, name_or_path, revision, config)
    else:
        model, info = load_weights(transformers.AutoModel, name_or_path, revision, config)
        refuse_lost(name_or_path, [key for key in missing_weights(info) if not key.endswith("masked_spec_embed")])
    return Encoder(model.to(device).eval().requires_grad_(False), extractor)


class Moments:
    """Count, sum and sum of squares over time: (layers, width) float64, so that pieces of a recording add up."""

    def __init__(self):
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, frames: torch.Tensor) -> None:
        """frames: (layers, frames, width)."""
        frames = frames.double()
        self.count += frames.shape[1]
        self.sum = self.sum + frames.sum(1)
        self.squares = self.squares + frames.square().sum(1)

    def pooled(self) -> np.ndarray:
        """(layers, 2 * width) float32: the mean, then the deviation."""
        mean = self.sum / self.count
        deviation = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        return torch.cat([mean, deviation], -1).float().numpy()


def embed(
    encoder: Encoder,
    rows: Rows,
    *,
    max_seconds: float = MAX_SECONDS,
    batch_seconds: float = BATCH_SECONDS,
    min_seconds: float = 0.1,
    workers: int = 0,
    show_progress: bool = False,
) -> Embeddings:
    """One embedding for each recording that can be read, in the order of their names.

    Recordings longer than `max_seconds` are read in equal pieces, which the encoder hears one by one; mean and
    deviation are over all of them. What memory is needed doesn't grow with the length of a recording.
    """
    plan = divide_evenly(min_seconds, max_seconds)
    moments, labels, skipped = defaultdict(Moments), {}, Tally()
    total = len(rows) if isinstance(rows, IndexedRows) else None
    with tqdm(total=total, desc="listening", unit=" recordings", disable=not show_progress, leave=False) as bar:
        for window, frames in listen(encoder, rows, plan, skipped, max(batch_seconds, max_seconds), workers):
            key = (window["name"], str(window["label"]))
            labels[key] = window["label"]
            moments[key].add(frames)
            bar.update(len(moments) - bar.n)
    order = sorted(moments)
    values = np.stack([moments[key].pooled() for key in order]) if order else np.zeros((0, encoder.num_layers, 0))
    return Embeddings([name for name, _ in order], [labels[key] for key in order], values, skipped)


def listen(
    encoder, rows: Rows, plan: Plan, skipped: Tally, batch_seconds: float = BATCH_SECONDS, workers: int = 0
) -> Iterator[tuple[dict, torch.Tensor]]:
    """The plan's windows, once, and what the encoder makes of each: (layers, frames, width) float32 on the CPU.

    Args:
        encoder: an `Encoder`, or what has its `rate` and `layers`.
        skipped: gets what could not be read, and why.
        batch_seconds: no less than the plan's longest window.

    Yields:
        ({"name", "label", "machine", "start", "seconds"}, frames), start and length of the window in seconds.
    """
    stream = BatchStream([(rows, 1.0)], plan, as_they_are, rate=encoder.rate, batch_seconds=batch_seconds, train=False)
    for batch in StreamLoader(stream, workers):
        skipped.add(batch["skipped"], batch["rows"])
        if "waveforms" in batch:
            yield from zip(batch["windows"], encoder.layers(batch["waveforms"]))


def as_they_are(windows: list[Window], waveforms: list[np.ndarray]) -> dict:
    """Without padding: how much of it a model bears is the encoder's business."""
    return {
        "waveforms": waveforms,
        "windows": [
            {
                "name": window.row["name"],
                "label": window.row["label"],
                "machine": window.row.get("machine"),
                "start": window.start / window.rate,
                "seconds": window.seconds,
            }
            for window in windows
        ],
    }

"""What transformers' own `Wav2Vec2ForPreTraining` takes."""

import torch

from acoustic.models.contrastive import Targets, draw_targets
from acoustic.models.masking import draw_span_mask


def as_transformers(targets: Targets) -> dict:
    """Targets as (batch, frames) and (batch, frames, negatives) into the flattened (batch * frames)."""
    count = targets.negatives.shape[-1]
    indices = torch.zeros(targets.mask.numel(), count, dtype=torch.int64)
    frames = targets.candidates[torch.arange(len(targets.candidates))[:, None, None], targets.negatives]
    indices[targets.predicted.flatten()] = frames.flatten(0, 1)
    return {"mask_time_indices": targets.mask, "sampled_negative_indices": indices.view(*targets.mask.shape, count)}


def draw(batch: int, frames: int, prob: float, generator: torch.Generator) -> dict:
    """Masks of spans of five frames, and ten negatives for each masked frame."""
    mask, places = draw_span_mask(batch, frames, prob, 5, 2, generator)
    return as_transformers(draw_targets(mask, places, 10, "masked", generator))

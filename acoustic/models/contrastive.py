"""What a contrastive model tells apart, and the loss (InfoNCE) of the wav2vec family, on masked frames only."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

NEGATIVES_FROM = ("masked", "utterance", "batch")


@dataclass
class Targets:
    """Frames to predict and what each is told apart from, in groups that are scored by one matrix product each.

    A group is a window, or the whole batch where negatives cross windows. Frames are indices into the flattened
    (batch * frames); positives and negatives are indices into the candidates of their group.
    """

    mask: torch.Tensor  # (batch, frames) bool
    predicted: torch.Tensor  # (groups, predicted) int64, the masked frames
    candidates: torch.Tensor  # (groups, candidates) int64, the frames that are quantized
    positives: torch.Tensor  # (groups, predicted) int64
    negatives: torch.Tensor  # (groups, predicted, negatives) int64

    def __len__(self) -> int:
        return self.predicted.numel()

    @classmethod
    def given(cls, mask_time_indices: torch.Tensor, sampled_negative_indices: torch.Tensor) -> "Targets":
        """transformers' format: (batch, frames) and (batch, frames, negatives) into (batch * frames).

        Any number of masked frames per row, any negatives; reading how many there are waits for the device.
        """
        mask = mask_time_indices.bool()
        predicted = mask.flatten().nonzero().squeeze(1)
        frames = torch.cat([predicted[:, None], sampled_negative_indices.flatten(0, 1)[predicted].long()], dim=1)
        candidates, places = frames.unique(return_inverse=True)
        return cls(mask, predicted[None], candidates[None], places[None, :, 0], places[None, :, 1:])


def draw_targets(
    mask: torch.Tensor, places: torch.Tensor, num_negatives: int, negatives_from: str, generator: torch.Generator
) -> Targets:
    """Negatives for every masked frame, uniform with replacement, never the frame itself.

    Args:
        mask, places: (batch, frames) and (batch, masked), of `draw_span_mask`.
        negatives_from: "masked": the masked frames of the same window (the paper's); "utterance": all frames of the
            window, more to draw from; "batch": the masked frames of all windows, for steady sounds whose frames are
            all alike within a recording.
    """
    batch, frames = mask.shape
    every = torch.arange(batch * frames, device=mask.device).view(batch, frames)
    predicted = every[:, :1] + places
    positives = torch.arange(places.shape[1], device=mask.device).expand_as(places)
    candidates = predicted
    if negatives_from == "utterance":
        candidates, positives = every, places
    elif negatives_from == "batch":
        predicted = candidates = predicted.view(1, -1)
        positives = torch.arange(predicted.numel(), device=mask.device)[None]
    others = candidates.shape[1] - 1
    shape = (*predicted.shape, num_negatives)
    negatives = torch.randint(max(others, 1), shape, generator=generator, device=mask.device)
    negatives += negatives >= positives[..., None]
    # A lone masked frame has no other to be told from: it gets itself, and the loss masks equal codes.
    negatives.clamp_(max=others)
    return Targets(mask, predicted, candidates, positives, negatives)


def contrastive_logits(
    predictions: torch.Tensor, candidates: torch.Tensor, codes: torch.Tensor, targets: Targets, temperature: float
) -> torch.Tensor:
    """Cosine similarity / temperature of each prediction with its target (column 0) and its negatives, in float32.

    Args:
        predictions: (groups, predicted, width), the context's vectors of the masked frames.
        candidates: (groups, candidates, width), the quantized vectors.
        codes: (groups, candidates, ...) int, the codewords chosen; a negative with the positive's is set to -inf.

    Returns:
        (groups, predicted, 1 + negatives) float32.
    """
    # One matrix product and a gather of scalars; gathering the vectors would take `negatives` times the memory.
    # Autocast would turn the product into bfloat16, whose steps near a logit of 8 are 1/16.
    with torch.autocast(predictions.device.type, enabled=False):
        predictions, candidates = F.normalize(predictions.float(), dim=-1), F.normalize(candidates.float(), dim=-1)
        similarity = predictions @ candidates.transpose(1, 2) / temperature
    positives, negatives = targets.positives[..., None], targets.negatives
    logits = similarity.gather(2, torch.cat([positives, negatives], dim=2))
    same_codes = torch.zeros_like(logits, dtype=torch.bool)
    same_codes[..., 1:] = equal_codes(codes, positives, negatives)
    return logits.masked_fill(same_codes, float("-inf"))


def equal_codes(codes: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """(groups, predicted, negatives) bool: whether a negative has all codes of the positive."""
    equal = torch.ones_like(negatives, dtype=torch.bool)
    for code in codes.unbind(-1):
        rows = code[:, None].expand(-1, negatives.shape[1], -1)
        equal &= rows.gather(2, negatives) == rows.gather(2, positives)
    return equal


def count_correct(logits: torch.Tensor) -> torch.Tensor:
    """How often the positive (column 0) beats all of its negatives; where all are -inf there was nothing to beat."""
    best_negative = logits[..., 1:].amax(-1)
    return ((logits[..., 0] > best_negative) & best_negative.isfinite()).sum()

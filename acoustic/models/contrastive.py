"""Negatives and the contrastive loss (InfoNCE) of the wav2vec family, on masked frames only."""

import torch
import torch.nn.functional as F

NEGATIVES_FROM = ("masked", "batch")


def draw_negatives(
    mask: torch.Tensor, num_negatives: int, negatives_from: str, generator: torch.Generator
) -> torch.Tensor:
    """Negatives for every masked frame, uniform with replacement, never the frame itself.

    Args:
        mask: (batch, frames) bool, the same number of masked frames in every row.
        negatives_from: "masked": the masked frames of the same utterance (the paper's); "batch": those of all
            utterances, for steady sounds whose frames are all alike within a recording.

    Returns:
        (batch, frames, num_negatives) int64 indices into the flattened (batch * frames), which is what transformers'
        `Wav2Vec2ForPreTraining` takes; rows of unmasked frames are zero.
    """
    batch, frames = mask.shape
    positions = mask.flatten().nonzero().squeeze(1)
    groups = 1 if negatives_from == "batch" else batch
    candidates = len(positions) // groups
    own = torch.arange(candidates).repeat(groups)[:, None]
    drawn = torch.randint(max(candidates - 1, 1), (len(positions), num_negatives), generator=generator)
    drawn += drawn >= own
    # A lone masked frame has no other to be told from: it gets itself, and the loss masks equal codes.
    drawn.clamp_(max=candidates - 1)
    first_of_group = (torch.arange(len(positions)) // candidates * candidates)[:, None]
    negatives = torch.zeros(batch * frames, num_negatives, dtype=torch.int64)
    negatives[positions] = positions[drawn + first_of_group]
    return negatives.view(batch, frames, num_negatives)


def contrastive_logits(
    predictions: torch.Tensor, targets: torch.Tensor, codes: torch.Tensor, negatives: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Cosine similarity / temperature of each prediction with its target (column 0) and its negatives, in float32.

    Args:
        predictions, targets: (masked, width), the context's and the quantized vectors of the masked frames.
        codes: (masked, groups) int, the codewords chosen; a negative with the positive's codes is set to -inf.
        negatives: (masked, num_negatives) int, indices into the masked frames.

    Returns:
        (masked, 1 + num_negatives) float32.
    """
    # One matrix product and a gather of scalars; gathering the vectors would take num_negatives times the memory.
    # Autocast would turn the product into bfloat16, whose steps near a logit of 8 are 1/16.
    with torch.autocast(predictions.device.type, enabled=False):
        similarity = F.normalize(predictions.float(), dim=-1) @ F.normalize(targets.float(), dim=-1).T / temperature
    same_codes = (codes[negatives] == codes[:, None]).all(-1)
    negative_logits = similarity.gather(1, negatives).masked_fill(same_codes, float("-inf"))
    return torch.cat([similarity.diagonal()[:, None], negative_logits], dim=1)


def count_correct(logits: torch.Tensor) -> torch.Tensor:
    """How often the positive (column 0) beats all of its negatives; where all are -inf there was nothing to beat."""
    best_negative = logits[:, 1:].amax(1)
    return ((logits[:, 0] > best_negative) & best_negative.isfinite()).sum()

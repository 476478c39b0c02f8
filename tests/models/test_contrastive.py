"""Negatives and the contrastive logits, against naive loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from acoustic.models.contrastive import contrastive_logits, count_correct, draw_negatives
from acoustic.models.masking import draw_span_mask

BATCH, FRAMES = 3, 60


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def mask():
    return draw_span_mask(BATCH, FRAMES, 0.65, 10, seeded())


@pytest.mark.parametrize("negatives_from", ["masked", "batch"])
def test_negatives_are_masked_frames_and_never_the_frame_itself(mask, negatives_from):
    negatives = draw_negatives(mask, 20, negatives_from, seeded())
    assert negatives.shape == (BATCH, FRAMES, 20)
    assert negatives.dtype == torch.int64
    assert mask.flatten()[negatives[mask]].all()
    own = mask.flatten().nonzero()
    assert (negatives.flatten(0, 1)[own[:, 0]] != own).all()
    assert (negatives[~mask] == 0).all()


def test_masked_stays_in_the_utterance_and_batch_crosses(mask):
    utterance = torch.arange(BATCH)[:, None, None].expand(BATCH, FRAMES, 20)[mask]
    same = draw_negatives(mask, 20, "masked", seeded())[mask] // FRAMES == utterance
    assert same.all()
    crossed = (draw_negatives(mask, 20, "batch", seeded())[mask] // FRAMES != utterance).float().mean()
    assert crossed == pytest.approx(2 / 3, abs=0.03)


@pytest.mark.parametrize("negatives_from", ["masked", "batch"])
def test_negatives_are_uniform(mask, negatives_from):
    negatives = draw_negatives(mask, 3000, negatives_from, seeded()).flatten(0, 1)
    positions = mask.flatten().nonzero().squeeze(1)
    candidates = len(positions) if negatives_from == "batch" else len(positions) // BATCH
    for position in (positions[0], positions[-1]):
        counts = negatives[position].bincount(minlength=BATCH * FRAMES)
        expected = 3000 / (candidates - 1)
        assert (counts > 0).sum() == candidates - 1
        # Poisson: seven standard deviations hold for all candidates.
        assert (counts[counts > 0] - expected).abs().max() < 7 * math.sqrt(expected)


def test_a_lone_masked_frame_gets_itself():
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 3] = True
    negatives = draw_negatives(mask, 4, "masked", seeded())
    assert negatives[0, 3].tolist() == [3] * 4
    assert negatives[1, 3].tolist() == [8] * 4


@pytest.fixture
def vectors():
    """Ten masked frames of which every third has the same codes, so equal negatives do occur."""
    generator = seeded(1)
    codes = torch.randint(3, (10, 2), generator=generator)
    codes[::3] = codes[0]
    codebook = torch.randn(3, 3, 8, generator=generator)
    targets = codebook[codes[:, 0], codes[:, 1]]
    predictions = torch.randn(10, 8, generator=generator)
    own = torch.arange(10)[:, None]
    negatives = torch.randint(9, (10, 6), generator=generator)
    return predictions, targets, codes, negatives + (negatives >= own)


def naive_logits(predictions, targets, codes, negatives, temperature):
    rows = []
    for index in range(len(predictions)):
        row = [F.cosine_similarity(predictions[index], targets[index], dim=0) / temperature]
        for negative in negatives[index]:
            equal = torch.equal(codes[negative], codes[index])
            similarity = F.cosine_similarity(predictions[index], targets[negative], dim=0) / temperature
            row.append(torch.tensor(-math.inf) if equal else similarity)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_logits_equal_a_naive_loop(vectors):
    logits, naive = contrastive_logits(*vectors, 0.1), naive_logits(*vectors, 0.1)
    assert logits.isinf().any()
    torch.testing.assert_close(logits, naive, rtol=1e-5, atol=1e-5)


def test_logits_are_float32_in_half_precision(vectors):
    predictions, targets, codes, negatives = vectors
    logits = contrastive_logits(predictions.bfloat16(), targets.bfloat16(), codes, negatives, 0.1)
    assert logits.dtype == torch.float32


def test_accuracy_equals_a_naive_loop(vectors):
    logits = contrastive_logits(*vectors, 0.1)
    logits[4, 0] = 100.0
    right = 0
    for row in logits.tolist():
        finite = [value for value in row[1:] if math.isfinite(value)]
        right += bool(finite) and row[0] > max(finite)
    assert 0 < right < 10
    assert count_correct(logits) == right


def test_a_tie_is_not_right():
    assert count_correct(torch.tensor([[1.0, 1.0, 0.5], [1.0, 0.5, 0.5]])) == 1


def test_a_collapsed_codebook_is_never_right():
    """All codes equal: every negative is masked and the loss is 0, which must not look like success."""
    codes = torch.zeros(10, 2, dtype=torch.int64)
    negatives = (torch.arange(10)[:, None] + torch.arange(1, 6)) % 10
    logits = contrastive_logits(torch.randn(10, 8), torch.ones(10, 8), codes, negatives, 0.1)
    assert logits[:, 1:].isneginf().all()
    assert count_correct(logits) == 0


def test_logits_stay_float32_under_autocast():
    """In bfloat16 the steps near a logit of 8 are 1/16: ties would count as wrong, and the loss would be coarse."""
    generator = torch.Generator().manual_seed(0)
    predictions, targets = torch.randn(2, 20, 8, generator=generator)
    codes, negatives = torch.arange(20)[:, None], torch.randint(20, (20, 5), generator=generator)
    expected = contrastive_logits(predictions, targets, codes, negatives, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_logits(predictions, targets, codes, negatives, 0.1), expected)
    assert expected.dtype == torch.float32

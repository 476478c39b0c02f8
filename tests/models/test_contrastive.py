"""Negatives and the contrastive logits, against naive loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.wav2vec2.modeling_wav2vec2 import _sample_negative_indices

from acoustic.models.contrastive import Targets, contrastive_logits, count_correct, draw_targets

BATCH, FRAMES, MASKED = 3, 60, 25


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def mask():
    """(mask, places)"""
    places = torch.rand(BATCH, FRAMES, generator=seeded()).topk(MASKED, dim=1).indices.sort(dim=1).values
    return torch.zeros(BATCH, FRAMES, dtype=torch.bool).scatter_(1, places, True), places


def frames_of(targets, indices) -> torch.Tensor:
    """Indices into the candidates of a group -> into the flattened (batch * frames)."""
    rows = targets.candidates[:, None].expand(-1, indices.shape[1], -1)
    return rows.gather(2, indices if indices.dim() == 3 else indices[..., None])


@pytest.mark.parametrize("negatives_from", ["masked", "utterance", "batch"])
def test_negatives_are_other_frames_of_the_right_ones(mask, negatives_from):
    targets = draw_targets(*mask, 200, negatives_from, seeded())
    own, negatives = frames_of(targets, targets.positives), frames_of(targets, targets.negatives)
    assert torch.equal(targets.predicted.flatten(), mask[0].flatten().nonzero().squeeze(1))
    assert torch.equal(own.squeeze(2), targets.predicted)
    assert len(targets) == BATCH * MASKED
    assert (negatives != own).all()
    assert mask[0].flatten()[negatives].float().mean() == pytest.approx(
        1.0 if negatives_from != "utterance" else (MASKED - 1) / (FRAMES - 1), abs=0.01
    )
    crossed = (negatives // FRAMES != own // FRAMES).float().mean()
    assert crossed == pytest.approx(2 / 3 if negatives_from == "batch" else 0.0, abs=0.02)


@pytest.mark.parametrize("negatives_from", ["masked", "utterance", "batch"])
def test_negatives_are_uniform(mask, negatives_from):
    targets = draw_targets(*mask, 3000, negatives_from, seeded())
    possible = {"masked": MASKED, "utterance": FRAMES, "batch": BATCH * MASKED}[negatives_from] - 1
    for row in (targets.negatives[0, 0], targets.negatives[-1, -1]):
        counts, expected = row.bincount(), 3000 / possible
        assert (counts > 0).sum() == possible
        # Poisson: seven standard deviations hold for all candidates.
        assert (counts[counts > 0] - expected).abs().max() < 7 * math.sqrt(expected)


def test_negatives_are_distributed_as_those_of_transformers(mask):
    """How often each masked frame is a negative of each other one, over many draws."""
    draws = 300
    np.random.seed(0)
    theirs = np.concatenate(
        [_sample_negative_indices((BATCH, FRAMES), 10, mask[0].numpy())[mask[0].numpy()] for _ in range(draws)], axis=1
    )
    ours = torch.cat([draw_targets(*mask, 10, "masked", seeded(seed)).negatives for seed in range(draws)], dim=2)
    targets = draw_targets(*mask, 10, "masked", seeded())
    ours = frames_of(targets, ours).flatten(0, 1).numpy()
    assert ours.shape == theirs.shape
    for mine, other in zip(ours, theirs):
        counts = [np.bincount(row, minlength=BATCH * FRAMES) for row in (mine, other)]
        assert np.array_equal(counts[0] > 0, counts[1] > 0)
        # A difference of two Poisson counts around 125: seven standard deviations.
        assert np.abs(counts[0] - counts[1]).max() < 7 * math.sqrt(2 * 10 * draws / (MASKED - 1))


def test_a_lone_masked_frame_gets_itself():
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 3] = True
    targets = draw_targets(mask, torch.tensor([[3], [3]]), 4, "masked", seeded())
    assert frames_of(targets, targets.negatives).flatten().tolist() == [3] * 4 + [8] * 4


def test_given_masks_and_negatives_keep_their_meaning():
    """In transformers' format, with another number of masked frames in every row."""
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    negatives = torch.randint(8, (2, 4, 6), generator=seeded())
    targets = Targets.given(mask, negatives)
    assert targets.predicted.tolist() == [[0, 2, 3, 5]]
    assert torch.equal(frames_of(targets, targets.positives).squeeze(2), targets.predicted)
    assert torch.equal(frames_of(targets, targets.negatives)[0], negatives.flatten(0, 1)[[0, 2, 3, 5]])


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


def our_logits(predictions, targets, codes, negatives, temperature=0.1):
    """`contrastive_logits` of one group in which all candidates are predicted."""
    own = torch.arange(len(predictions))[None]
    given = Targets(None, own, own, own, negatives[None])
    return contrastive_logits(predictions[None], targets[None], codes[None], given, temperature)[0]


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
    logits, naive = our_logits(*vectors), naive_logits(*vectors, 0.1)
    assert logits.isinf().any()
    torch.testing.assert_close(logits, naive, rtol=1e-5, atol=1e-5)


def test_logits_are_float32_in_half_precision(vectors):
    predictions, targets, codes, negatives = vectors
    logits = our_logits(predictions.bfloat16(), targets.bfloat16(), codes, negatives)
    assert logits.dtype == torch.float32


def test_accuracy_equals_a_naive_loop(vectors):
    logits = our_logits(*vectors)
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
    logits = our_logits(torch.randn(10, 8), torch.ones(10, 8), codes, negatives)
    assert logits[:, 1:].isneginf().all()
    assert count_correct(logits) == 0


def test_logits_stay_float32_under_autocast():
    """In bfloat16 the steps near a logit of 8 are 1/16: ties would count as wrong, and the loss would be coarse."""
    generator = torch.Generator().manual_seed(0)
    predictions, targets = torch.randn(2, 20, 8, generator=generator)
    codes, negatives = torch.arange(20)[:, None], torch.randint(20, (20, 5), generator=generator)
    expected = our_logits(predictions, targets, codes, negatives)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(our_logits(predictions, targets, codes, negatives), expected)
    assert expected.dtype == torch.float32

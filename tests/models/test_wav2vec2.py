"""Our forward against transformers' `Wav2Vec2ForPreTraining`: same weights, masks and negatives, same numbers."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from acoustic.models import Wav2Vec2ForPreTraining

NO_DROPOUT = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
    "layerdrop": 0.0,
}


@pytest.fixture(params=["group_norm_checkpoint", "layer_norm_checkpoint"])
def models(request):
    """(ours, transformers') with the weights of one checkpoint; codes made to vary, as a trained model's do."""
    checkpoint = request.getfixturevalue(request.param)
    both = []
    for model_class in (Wav2Vec2ForPreTraining, transformers.Wav2Vec2ForPreTraining):
        model = model_class.from_pretrained(checkpoint, **NO_DROPOUT)
        with torch.no_grad():
            model.quantizer.weight_proj.weight.mul_(3)
        both.append(model)
    return both


@pytest.fixture
def batch(models):
    return make_batch(models[0])


def make_batch(model, negatives_from="masked", windows=3, seconds=1.2):
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(int(seconds * 16000)) / 16000
    pitch = torch.rand(windows, 1, generator=generator) * 2000
    sweep = torch.sin(2 * torch.pi * (pitch + 1500 * time) * time)
    input_values = sweep + 0.3 * torch.randn(windows, len(time), generator=generator)
    targets = model.draw_targets(input_values, generator, mask_prob=0.65, mask_length=5, negatives_from=negatives_from)
    return {"input_values": input_values, **targets}


def assert_same_losses(ours, theirs):
    for name in ("loss", "contrastive_loss", "diversity_loss", "codevector_perplexity"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4, msg=name)


def assert_same_gradients(ours, theirs, at_least: float):
    """Of every parameter, to a thousandth of its largest; and `at_least` a share of the parameters has any."""
    names = 0
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # The loss throws away what unmasked frames add, so transformers has zeros where we have no graph.
        left = mine.grad if mine.grad is not None else torch.zeros_like(mine)
        right = other.grad if other.grad is not None else torch.zeros_like(other)
        scale = right.abs().max().item()
        names += scale > 0
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3 * scale + 1e-6, msg=name)
    assert names >= at_least * len(list(ours.parameters()))


@pytest.mark.parametrize("negatives_from", ["masked", "batch"])
def test_evaluation_equals_transformers(models, negatives_from):
    ours, theirs = (model.eval() for model in models)
    batch = make_batch(ours, negatives_from)
    mine, other = ours(**batch), theirs(**batch)
    assert mine.codevector_perplexity > 3  # else the comparison shows little
    assert_same_losses(mine, other)
    mine.loss.backward()
    other.loss.backward()
    # The quantizer's argmax passes no gradient to its projection in evaluation; everything else has one.
    assert_same_gradients(ours, theirs, at_least=0.9)


def same_noise(logits, tau=1.0, hard=False, dim=-1):
    """torch's `gumbel_softmax`, with noise that follows from the logits.

    We draw noise for the masked frames and transformers for all, so a seed can't give both the same.
    """
    noisy = (logits + 2 * torch.sin(50 * logits.detach())) / tau
    soft, codes = noisy.softmax(dim), noisy.argmax(dim)
    return F.one_hot(codes, logits.shape[dim]).type_as(logits) - soft.detach() + soft


def test_training_equals_transformers(models, batch, monkeypatch):
    monkeypatch.setattr(F, "gumbel_softmax", same_noise)
    ours, theirs = (model.train() for model in models)
    for model in models:
        model.set_gumbel_temperature(1.7)
    mine, other = ours(**batch), theirs(**batch)
    assert_same_losses(mine, other)
    mine.loss.backward()
    other.loss.backward()
    assert_same_gradients(ours, theirs, at_least=1.0)


def test_gumbel_noise_changes_the_codes_in_training_only(models, batch):
    ours, _ = models
    features = torch.randn(50, ours.config.conv_dim[-1])
    ours.train()
    assert not torch.equal(ours.quantize(features)[1], ours.quantize(features)[1])
    ours.eval()
    assert torch.equal(ours.quantize(features)[1], ours.quantize(features)[1])


def test_the_loss_is_summed_and_the_metrics_are_sums(models, batch):
    ours = models[0].eval()
    output = ours(**batch)
    count = int(batch["mask_time_indices"].sum())
    assert output.num_targets == count
    expected = output.contrastive_loss + 0.1 * output.diversity_loss
    torch.testing.assert_close(output.loss, expected)
    assert 0 <= output.metrics["accuracy"] <= count
    assert not any(value.requires_grad for value in output.metrics.values())
    torch.testing.assert_close(output.metrics["code_perplexity"] / count, output.codevector_perplexity)


def test_accuracy_equals_a_loop_over_transformers_vectors(models, batch):
    """Cosine similarity with the positive above that with each negative of another vector, frame by frame."""
    ours, theirs = (model.eval() for model in models)
    with torch.no_grad():
        correct, output = ours(**batch).metrics["accuracy"], theirs(**batch)
    predictions, targets = output.projected_states.flatten(0, 1), output.projected_quantized_states.flatten(0, 1)
    naive = 0
    for position in batch["mask_time_indices"].flatten().nonzero().squeeze(1):
        own = F.cosine_similarity(predictions[position], targets[position], dim=0)
        negatives = targets[batch["sampled_negative_indices"].flatten(0, 1)[position]]
        others = negatives[(negatives - targets[position]).abs().amax(1) > 1e-6]
        naive += bool(len(others)) and bool((own > F.cosine_similarity(predictions[position], others)).all())
    assert 0 < naive < batch["mask_time_indices"].sum()
    assert correct == naive


def test_a_collapsed_codebook_has_accuracy_zero(models, batch):
    ours = models[0].eval()
    with torch.no_grad():
        ours.quantizer.weight_proj.weight.zero_()
        output = ours(**batch)
    assert output.contrastive_loss == 0
    assert output.metrics["accuracy"] == 0
    assert output.codevector_perplexity == pytest.approx(ours.config.num_codevector_groups)


def test_half_precision_stays_near(models, batch):
    ours = models[0].eval()
    with torch.no_grad():
        full = ours(**batch).loss
        with torch.autocast("cpu", torch.bfloat16):
            half = ours(**batch).loss
    assert half.dtype == torch.float32
    assert half == pytest.approx(full.item(), rel=0.1)


def test_targets_follow_the_generator(models, batch):
    again = make_batch(models[0])
    assert all(torch.equal(batch[name], again[name]) for name in batch)

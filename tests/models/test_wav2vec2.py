"""Our forward against transformers' `Wav2Vec2ForPreTraining`: same weights, masks and negatives, same numbers."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from stock import as_transformers
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices

from acoustic.models.wav2vec2 import Wav2Vec2ForPreTraining

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
        model = model_class.from_pretrained(checkpoint, **NO_DROPOUT, mask_time_prob=0.65, mask_time_length=5)
        with torch.no_grad():
            model.quantizer.weight_proj.weight.mul_(3)
        both.append(model)
    return both


@pytest.fixture
def batch(models):
    return make_batch(models[0])


def make_audio(windows=3, seconds=1.2):
    """Sweeps from different pitches, in noise."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(int(seconds * 16000)) / 16000
    pitch = torch.rand(windows, 1, generator=generator) * 2000
    sweep = torch.sin(2 * torch.pi * (pitch + 1500 * time) * time)
    return sweep + 0.3 * torch.randn(windows, len(time), generator=generator)


def make_batch(model, seed=0):
    """Audio with masks and negatives in transformers' format."""
    audio = make_audio()
    return {"input_values": audio, **as_transformers(model.draw_targets(*audio.shape, seed))}


def padded_batch(model):
    """Three windows of different lengths as the official example collates them, by transformers' own helpers."""
    audio, lengths = make_audio(), torch.tensor([19200, 12000, 16000])
    attention_mask = (torch.arange(19200) < lengths[:, None]).long()
    frames = model._get_feature_vector_attention_mask(model.count_frames(19200), attention_mask)
    np.random.seed(0)
    mask = _compute_mask_indices(tuple(frames.shape), 0.65, 5, attention_mask=frames, min_masks=2)
    negatives = _sample_negative_indices(tuple(frames.shape), 10, mask_time_indices=mask)
    assert len(set(mask.sum(1))) > 1
    return {
        "input_values": audio * attention_mask,
        "attention_mask": attention_mask,
        "mask_time_indices": torch.from_numpy(mask),
        "sampled_negative_indices": torch.from_numpy(negatives).long(),
    }


def assert_same_losses(ours, theirs):
    for name in ("loss", "contrastive_loss", "diversity_loss", "codevector_perplexity"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4, msg=name)


def assert_same_gradients(ours, theirs, at_least: float):
    """Of every parameter, to a thousandth of its norm; and `at_least` a share of the parameters has any."""
    names = 0
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # The loss throws away what unmasked frames add, so transformers has zeros where we have no graph.
        left = mine.grad if mine.grad is not None else torch.zeros_like(mine)
        right = other.grad if other.grad is not None else torch.zeros_like(other)
        norm = right.norm()
        names += norm.item() > 0
        # Some gradients are 0 but for rounding: a softmax takes out what is the same for all keys.
        assert (left - right).norm() <= 1e-3 * norm + 1e-5, f"{name}: {left} instead of {right}"
    assert names >= at_least * len(list(ours.parameters()))


@pytest.mark.parametrize("make", [make_batch, padded_batch])
def test_evaluation_equals_transformers(models, make):
    ours, theirs = (model.eval() for model in models)
    batch = make(ours)
    mine, other = ours(**batch), theirs(**copy.deepcopy(batch))
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
    noisy = (logits + 2 * torch.sin(5 * logits.detach())) / tau
    soft, codes = noisy.softmax(dim), noisy.argmax(dim)
    return F.one_hot(codes, logits.shape[dim]).type_as(logits) - soft.detach() + soft


@pytest.mark.parametrize("recompute_convs", [False, True])
@pytest.mark.parametrize("make", [make_batch, padded_batch])
def test_training_equals_transformers(models, make, recompute_convs, monkeypatch):
    monkeypatch.setattr(F, "gumbel_softmax", same_noise)
    ours, theirs = (model.train() for model in models)
    ours.recompute_convs = recompute_convs
    for model in models:
        model.set_gumbel_temperature(1.7)
    batch = make(ours)
    mine, other = ours(**batch), theirs(**copy.deepcopy(batch))
    assert_same_losses(mine, other)
    mine.loss.backward()
    other.loss.backward()
    assert_same_gradients(ours, theirs, at_least=1.0)


@pytest.mark.parametrize("negatives_from", ["masked", "utterance", "batch"])
def test_what_it_draws_itself_equals_transformers_given_the_same(models, negatives_from, monkeypatch):
    monkeypatch.setattr(F, "gumbel_softmax", same_noise)
    ours, theirs = (model.train() for model in models)
    ours.config.negatives_from = negatives_from
    audio = make_audio()
    mine = ours(audio, seed=5)
    other = theirs(audio, **as_transformers(ours.draw_targets(*audio.shape, 5)))
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
    lowest, groups = output.metrics["lowest_group_perplexity"] / count, ours.config.num_codevector_groups
    assert 1 <= lowest <= output.codevector_perplexity / groups


def test_a_dead_group_shows_in_the_lowest_perplexity(models, batch):
    """The sum over groups hides it: the others' codes are enough for a healthy total."""
    ours = models[0].eval()
    quantizer = ours.quantizer
    with torch.no_grad():
        quantizer.weight_proj.weight[: quantizer.num_vars] = 0
        output = ours(**batch)
    assert output.metrics["lowest_group_perplexity"] / output.num_targets == pytest.approx(1)
    assert output.codevector_perplexity > quantizer.num_groups


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
    ours, theirs = (model.eval() for model in models)
    full = ours(**batch)
    full.loss.backward()
    gradients = [parameter.grad.clone().flatten() for parameter in ours.wav2vec2.parameters()]
    ours.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half, other = ours(**batch), theirs(**batch)
    half.loss.backward()
    other.loss.backward()
    assert half.loss.dtype == torch.float32
    exact, mine, stock = (output.loss.item() for output in (full, half, other))
    assert mine == pytest.approx(exact, rel=0.03)
    assert abs(mine - exact) < 2 * abs(stock - exact) + 0.01 * exact
    # The rounding of a tiny model's gradients is large; ours must not be further off than transformers' own.
    away = [
        (torch.cat([p.grad.flatten() for p in model.wav2vec2.parameters()]) - torch.cat(gradients)).norm()
        for model in (ours, theirs)
    ]
    assert away[0] < 1.2 * away[1]


def test_targets_follow_the_seed(models):
    ours = models[0].eval()
    audio = make_audio()
    losses = [ours(audio, seed=seed).loss.item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    assert ours(audio, seed=1).num_targets == ours.count_targets(*audio.shape)
    assert int(ours.draw_targets(*audio.shape, 1).mask.sum()) == ours.count_targets(*audio.shape)


def test_nothing_is_counted_on_the_device(models):
    """With everything drawn here, no operator's output size depends on values: what would wait for a GPU."""
    ours = models[0].train()
    waits = {"aten::nonzero", "aten::item", "aten::_local_scalar_dense", "aten::unique2", "aten::masked_select"}
    audio = make_audio()
    ours(audio, seed=0)  # how many frames to mask is simulated once for each shape
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours(audio, seed=1).loss.backward()
    seen = {event.key for event in profile.key_averages()}
    assert "aten::topk" in seen
    assert not waits & seen


def test_layerdrop_leaves_out_the_layers_it_names(models):
    ours, theirs = (model.train() for model in models)
    audio = make_audio()
    layer = ours.wav2vec2.encoder.layers[0]
    output = ours(audio, seed=0, kept_layers=(False, True))
    output.loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in layer.parameters())
    assert ours.wav2vec2.encoder.layers[1].attention.q_proj.weight.grad.any()
    targets = as_transformers(ours.draw_targets(*audio.shape, 0))
    theirs.wav2vec2.encoder.layers = theirs.wav2vec2.encoder.layers[1:]
    ours.eval(), theirs.eval()
    with torch.no_grad():
        assert ours(audio, **targets, kept_layers=(False, True)).loss != theirs(audio, **targets).loss  # eval: all
        ours.train()
        ours.quantizer.eval(), theirs.quantizer.eval()
        hidden = ours.encode(audio, None, targets["mask_time_indices"], (False, True))[0]
        expected = theirs.wav2vec2(audio, mask_time_indices=targets["mask_time_indices"]).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


def test_layerdrop_is_drawn_at_its_rate(models):
    ours = models[0]
    ours.config.layerdrop = 0.3
    drawn = [kept for seed in range(500) for kept in ours.draw_kept_layers(torch.Generator().manual_seed(seed))]
    assert sum(drawn) / len(drawn) == pytest.approx(0.7, abs=0.05)
    torch.manual_seed(0)
    losses = {ours.train()(make_audio(), seed=0).loss.item() for _ in range(12)}
    assert len(losses) > 1  # drawn by the model itself where nobody says


def test_the_feature_gradient_is_scaled(models):
    gradients = {}
    ours = models[0].eval()
    for factor in (1.0, 0.1):
        ours.zero_grad()
        ours.config.feature_grad_mult = factor
        ours(make_audio(), seed=0).loss.backward()
        gradients[factor] = {name: parameter.grad.clone() for name, parameter in ours.wav2vec2.named_parameters()}
    for name, gradient in gradients[1.0].items():
        expected = 0.1 * gradient if name.startswith("feature_extractor") else gradient
        torch.testing.assert_close(gradients[0.1][name], expected, rtol=1e-3, atol=1e-5, msg=name)


def test_the_feature_penalty_is_the_mean_square_of_what_the_convs_give(models):
    ours, audio = models[0].eval(), make_audio()
    without = ours(audio, seed=0)
    assert "feature_penalty" not in without.metrics
    ours.config.feature_penalty_weight = 10.0
    output = ours(audio, seed=0)
    with torch.no_grad():
        expected = ours.wav2vec2.feature_extractor(audio).square().mean() * output.num_targets
    torch.testing.assert_close(output.metrics["feature_penalty"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.loss, without.loss + 10 * expected)


def test_the_temperature_is_one_tensor(models):
    """A number would be a constant of the compiled graph."""
    ours = models[0]
    ours.set_gumbel_temperature(2.0)
    tensor = ours.quantizer.temperature
    ours.set_gumbel_temperature(0.5)
    assert ours.quantizer.temperature is tensor
    assert tensor == 0.5
    assert not any("temperature" in name for name in ours.state_dict())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mask_time_indices": torch.ones(3, 59, dtype=torch.bool)}, "give both"),
        ({"attention_mask": torch.ones(3, 19200)}, "padded needs mask_time_indices"),
        ({"output_hidden_states": True}, "output_hidden_states: not given here"),
    ],
)
def test_what_it_does_not_take(models, arguments, words):
    with pytest.raises(ValueError, match=words):
        models[0](make_audio(), **arguments)

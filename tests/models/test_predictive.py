"""Predicting steps ahead: negatives, loss and accuracies against naive loops; and what wav2vec and CPC have alike."""

import pytest
import torch
import transformers

from acoustic.models import predictive
from acoustic.models.cpc import CPCConfig, CPCForPreTraining, CPCModel
from acoustic.models.predictive import (
    PredictiveConfig,
    chance_loss,
    count_positives,
    draw_negatives,
    score,
)
from acoustic.models.wav2vec import Wav2VecConfig, Wav2VecForPreTraining, Wav2VecModel

CONVS = {"conv_dim": [12, 16, 20], "conv_kernel": [20, 8, 4], "conv_stride": [10, 4, 4]}  # 160 samples a frame
SMALL = {
    "wav2vec": {**CONVS, "hidden_size": 16, "context_kernel": [2, 3], "num_steps": 4, "num_negatives": 5},
    "cpc": {**CONVS, "hidden_size": 16, "num_steps": 4, "num_negatives": 5},
}
CLASSES = {
    "wav2vec": (Wav2VecConfig, Wav2VecModel, Wav2VecForPreTraining),
    "cpc": (CPCConfig, CPCModel, CPCForPreTraining),
}
SYSTEMS = pytest.mark.parametrize("name", list(CLASSES))


def make_model(name, **changed):
    torch.manual_seed(0)
    config_class, _, model_class = CLASSES[name]
    model = model_class(config_class(**{**SMALL[name], **changed}))
    with torch.no_grad():
        for parameter in model.parameters():  # all of them matter: no bias that is 0, no logits that are all alike
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_audio(rows=3, samples=4000):
    return torch.randn(rows, samples, generator=torch.Generator().manual_seed(0))


# ---- negatives


@pytest.mark.parametrize("negatives_from", predictive.NEGATIVES_FROM)
def test_negatives_are_uniform_and_never_the_target(negatives_from):
    rows, frames, offset, number = 3, 7, 2, 4000
    negatives = draw_negatives(rows, frames, offset, number, negatives_from, torch.Generator().manual_seed(0))
    assert negatives.shape == (rows, frames - offset, number)
    for row in range(rows):
        for target in range(frames - offset):
            own = row * frames + offset + target
            window = range(rows * frames) if negatives_from == "batch" else range(row * frames, (row + 1) * frames)
            expected = torch.zeros(rows * frames)
            expected[[place for place in window if place != own]] = 1 / (len(window) - 1)
            counts = torch.bincount(negatives[row, target], minlength=rows * frames)
            assert counts[own] == 0
            torch.testing.assert_close(counts / number, expected, rtol=0, atol=0.03)


# ---- the loss


def naive(context, features, negatives, weight, bias, offset, steps, loss_type):
    """The papers' definition, one positive after the other: (losses, whether right) of each step."""
    rows, frames, dim = features.shape
    every = features.reshape(-1, dim)
    losses, right = [[] for _ in range(steps)], [[] for _ in range(steps)]
    for row in range(rows):
        for time in range(frames):
            for step in range(steps):
                target = time + offset + step
                if target >= frames:
                    continue
                predicted = weight[step * dim : (step + 1) * dim] @ context[row, time] + bias
                own = predicted @ features[row, target]
                others = [predicted @ every[place] for place in negatives[row, target - offset]]
                if loss_type == "binary":
                    loss = -torch.sigmoid(own).log() - sum((1 - torch.sigmoid(other)).log() for other in others)
                else:
                    loss = -(own.exp() / sum(value.exp() for value in [own, *others])).log()
                losses[step].append(loss)
                right[step].append(all(own > other for other in others))
    return losses, right


@SYSTEMS
@pytest.mark.parametrize("loss_type", predictive.LOSS_TYPES)
@pytest.mark.parametrize("negatives_from", predictive.NEGATIVES_FROM)
def test_loss_and_accuracies_equal_a_naive_loop(name, loss_type, negatives_from, monkeypatch):
    model = make_model(name, loss_type=loss_type, negatives_from=negatives_from)
    audio, config = make_audio(), model.config
    # Blocks of few frames, the last of them smaller.
    monkeypatch.setattr(predictive, "blocks", lambda index, source: [slice(i, i + 7) for i in range(0, len(index), 7)])
    output = model(audio, seed=3)
    output.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    features = model.base_model.extract_features(audio)
    context = model.base_model.contextualize(features).last_hidden_state
    negatives = draw_negatives(
        *features.shape[:2], config.first_step, 5, negatives_from, torch.Generator().manual_seed(3)
    )
    predictor = model.predictor
    bias = torch.zeros(20) if predictor.bias is None else predictor.bias
    losses, right = naive(context, features, negatives, predictor.weight, bias, config.first_step, 4, loss_type)
    total = sum(sum(step) for step in losses)
    total.backward()
    number = sum(len(step) for step in losses)
    torch.testing.assert_close(output.loss, total, rtol=1e-4, atol=1e-4)
    for mine, parameter in zip(gradients, model.parameters()):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-4 * parameter.grad.abs().max().item())
    assert output.num_targets == number == model.count_targets(*audio.shape)
    assert output.num_frames == features.shape[:2].numel()
    means = {key: value.item() / number for key, value in output.metrics.items()}
    assert tuple(means) == model.metric_names
    assert means["contrastive_loss"] == pytest.approx(total.item() / number, rel=1e-4)
    assert means["accuracy"] == pytest.approx(sum(map(sum, right)) / number)
    for step, hits in enumerate(right, 1):
        assert means[f"accuracy_{step}"] == pytest.approx(sum(hits) / len(hits), abs=1e-6)
    assert len(set(means.values())) > 3  # else the comparison shows little


def test_the_scores_gradients_are_exact():
    torch.manual_seed(0)
    left, right = torch.randn(6, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    rows, others = torch.randint(6, (4, 2)), torch.randint(5, (4, 3))
    left.requires_grad_(), right.requires_grad_()
    assert torch.autograd.gradcheck(predictive.Score.apply, (left, right, rows, others))


@pytest.mark.parametrize("elements", [1, 100, 2**20])
def test_blocks_cover_all_whatever_their_size(elements):
    index, source = torch.zeros(50, 3), torch.zeros(10, elements)
    parts = predictive.blocks(index, source)
    assert torch.equal(torch.cat([torch.arange(50)[part] for part in parts]), torch.arange(50))
    if elements > 1000:
        assert len(parts) == 50


def test_a_target_is_reached_by_the_steps_that_start_within_the_window():
    predictions, features = torch.randn(2, 9, 4, 3), torch.randn(2, 9, 3)
    negatives = draw_negatives(2, 9, 2, 5, "batch", torch.Generator())
    _, reached = score(predictions, features, negatives)
    assert reached.sum(0).tolist() == count_positives(9, 2, 4) == [7, 6, 5, 4]


@pytest.mark.parametrize("loss_type", predictive.LOSS_TYPES)
def test_equal_logits_have_the_loss_of_chance(loss_type):
    losses = predictive.candidate_loss(torch.zeros(4, 11), loss_type)
    torch.testing.assert_close(losses, torch.full((4,), chance_loss(loss_type, 10)))


def test_equals_are_guessed_among():
    """A collapsed model is at chance; of negatives with the positive's codes some are as good as it."""
    everything = torch.ones(5, 3, dtype=torch.bool)
    collapsed = predictive.accuracies(torch.zeros(2, 5, 3, 4), everything, [5, 5, 5])
    assert collapsed["accuracy"] / 30 == pytest.approx(1 / 4)
    logits = torch.zeros(2, 5, 3, 4)
    logits[..., 2:] = -1.0
    assert predictive.accuracies(logits, everything, [5, 5, 5])["accuracy"] / 30 == pytest.approx(1 / 2)
    logits[..., 3] = 1.0
    assert predictive.accuracies(logits, everything, [5, 5, 5])["accuracy"] == 0


@pytest.mark.parametrize(("values", "first"), [({}, 3), (CONVS, 2), ({"offset": 1}, 1), ({"offset": 7}, 7)])
def test_the_offset_is_the_receptive_field_in_frames_rounded_up(values, first):
    """465 samples at 160 for a frame; 210 at 160."""
    assert PredictiveConfig(**values).first_step == first


def test_a_fresh_model_is_at_chance():
    for name, (config_class, _, model_class) in CLASSES.items():
        torch.manual_seed(0)
        model = model_class(config_class(**SMALL[name]))
        output = model(make_audio(), seed=0)
        chance = chance_loss(model.config.loss_type, model.config.num_negatives)
        assert output.loss.item() / output.num_targets == pytest.approx(chance, rel=0.1)


# ---- both systems


@SYSTEMS
def test_targets_follow_the_seed(name):
    model, audio = make_model(name), make_audio()
    losses = [model(audio, seed=seed).loss.item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(5)
    drawn = [model(audio).loss.item() for _ in range(2)]
    torch.manual_seed(5)
    assert model(audio).loss.item() == drawn[0] != drawn[1]


@SYSTEMS
def test_every_parameter_has_a_gradient(name):
    for changed in ({}, {"conv_dim": [12, 16, 16], "loss_type": "infonce", "feat_extract_norm": "channel"}):
        model = make_model(name, **changed).train()
        model(make_audio(), seed=0).loss.backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@SYSTEMS
def test_too_short_a_window_is_one_line(name):
    model = make_model(name)
    needed = model.config.first_step + 4
    samples = model.config.receptive_field + (needed - 1) * 160
    assert model.count_targets(2, samples) == 2 * (1 + 2 + 3 + 4)
    assert model(make_audio(2, samples), seed=0).num_targets == 20
    assert model.count_targets(2, samples - 1) == model.count_targets(2, 10) == 0
    with pytest.raises(ValueError, match=f"{samples - 1} samples are {needed - 1} frames; .* takes {needed}"):
        model(make_audio(2, samples - 1))


@SYSTEMS
def test_a_padded_clip_equals_itself_alone(name):
    for norm in ("group", "channel", "none"):
        encoder = make_model(name, feat_extract_norm=norm).base_model.eval()
        audio, lengths = make_audio(), torch.tensor([4000, 1500, 2900])
        attention_mask = (torch.arange(4000) < lengths[:, None]).long()
        outputs = encoder(audio, attention_mask, output_hidden_states=True)
        real = encoder._get_feature_vector_attention_mask(outputs.last_hidden_state.shape[1], attention_mask)
        assert real.sum(1).tolist() == encoder._get_feat_extract_output_lengths(lengths).tolist()
        for row, length in enumerate(lengths.tolist()):
            alone = encoder(audio[row : row + 1, :length], output_hidden_states=True)
            assert alone.last_hidden_state.shape[1] == encoder._get_feat_extract_output_lengths(length)
            for mine, other in zip(outputs.hidden_states, alone.hidden_states):
                torch.testing.assert_close(mine[row, real[row]], other[0], rtol=1e-4, atol=1e-5)


@SYSTEMS
@pytest.mark.parametrize("width", [16, 20])
def test_hidden_states_are_as_many_as_the_config_says_and_as_wide(name, width):
    encoder = make_model(name, conv_dim=[12, 16, width]).base_model.eval()
    outputs = encoder(make_audio(), output_hidden_states=True)
    assert len(outputs.hidden_states) == encoder.config.num_hidden_states
    assert {states.shape[2] for states in outputs.hidden_states} == {16}
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert encoder(make_audio()).hidden_states is None
    assert encoder.extract_features(make_audio()).shape[2] == encoder.config.feature_size == width
    assert encoder.config.inputs_to_logits_ratio == 160


@SYSTEMS
def test_checkpoints_are_read_back(name, tmp_path):
    config_class, encoder_class, model_class = CLASSES[name]
    model, audio = make_model(name).eval(), make_audio()
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path).eval()
    values = (config.to_dict() for config in (model.config, config_class.from_pretrained(tmp_path)))
    mine, read = ({key: value[key] for key in config_class().to_dict()} for value in values)
    assert {**mine, "architectures": None} == {**read, "architectures": None}
    assert again(audio, seed=0).loss == model(audio, seed=0).loss
    encoder = encoder_class.from_pretrained(tmp_path).eval()
    assert torch.equal(encoder(audio).last_hidden_state, model.base_model(audio).last_hidden_state)


@SYSTEMS
def test_a_frozen_front_end_does_not_train(name):
    model = make_model(name)
    model.base_model.freeze_feature_encoder()
    model(make_audio(), seed=0).loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".encoder." in key)


@SYSTEMS
def test_half_precision_stays_near(name):
    model, audio = make_model(name), make_audio()
    exact = model(audio, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(audio, seed=0)
        half.loss.backward()
    assert half.loss.dtype == torch.float32
    assert half.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@SYSTEMS
def test_compiled_equals_eager(name):
    shapes = [(3, 4000), (2, 5000), (4, 3000)]
    model = make_model(name)

    def losses_and_gradients():
        model.zero_grad()
        outputs = [model(make_audio(*shape), seed=0) for shape in shapes]
        sum(output.loss for output in outputs).backward()
        return [output.loss.item() for output in outputs], [p.grad.clone() for p in model.parameters()]

    expected = losses_and_gradients()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_regions(backend="aot_eager")
    losses, gradients = losses_and_gradients()
    assert losses == pytest.approx(expected[0], rel=1e-4)
    for mine, other in zip(gradients, expected[1]):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
    counters = torch._dynamo.utils.counters
    # Each part with fixed sizes, then with free ones.
    assert counters["stats"]["unique_graphs"] == {"wav2vec": 4, "cpc": 2}[name]
    assert not counters["graph_break"]


@SYSTEMS
def test_nothing_waits_for_the_device(name):
    """No operator's output size depends on values, and no value is read."""
    model, audio = make_model(name).train(), make_audio()
    waits = {"aten::nonzero", "aten::_local_scalar_dense", "aten::unique2", "aten::masked_select"}
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(f"aten::{function.__name__.split('.')[0]}")
            return function(*args, **(kwargs or {}))

    with Watch():
        model(audio, seed=1).loss.backward()
    assert "aten::bmm" in seen
    assert not waits & set(seen)


@SYSTEMS
def test_what_a_run_asks_a_model(name):
    model = make_model(name)
    assert isinstance(model, transformers.PreTrainedModel)
    assert (model.family, model.normalizes_audio, model.base_model_prefix) == ("predictive", False, name)
    assert model.get_input_embeddings() is None and model.base_model.get_input_embeddings() is None
    assert model.config.model_type == name


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"offset": 0}, "offset must be at least 1"),
        ({"offset": "some"}, "offset must be at least 1"),
        ({"num_negatives": 0}, "num_negatives must be at least 1"),
        ({"negatives_from": "masked"}, "negatives_from must be one of utterance, batch"),
        ({"loss_type": "hinge"}, "loss_type must be one of binary, infonce"),
    ],
)
def test_impossible_values_are_one_line(values, words):
    with pytest.raises(ValueError, match=words) as caught:
        PredictiveConfig(**values)
    assert "\n" not in str(caught.value)

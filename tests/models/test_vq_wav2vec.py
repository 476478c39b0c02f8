"""vq-wav2vec with both quantizers: the loss against a naive loop, published sizes, its codes, and that it learns."""

import math

import pytest
import torch

from acoustic.models.predictive import chance_loss, draw_negatives
from acoustic.models.quantizers import count_codes
from acoustic.models.vq_wav2vec import VQWav2VecConfig, VQWav2VecForPreTraining, VQWav2VecModel

CONVS = {"conv_dim": [12, 16, 20], "conv_kernel": [20, 8, 4], "conv_stride": [10, 4, 4]}  # 160 samples a frame
SMALL = {
    **CONVS,
    "hidden_size": 16,
    "context_kernel": [2, 3],
    "num_steps": 4,
    "num_negatives": 5,
    "num_codevectors_per_group": 7,
}
KINDS = pytest.mark.parametrize("kind", ["gumbel", "kmeans"])


def make_model(kind="gumbel", **changed):
    torch.manual_seed(0)
    model = VQWav2VecForPreTraining(VQWav2VecConfig(**{**SMALL, "quantizer_type": kind, **changed}))
    with torch.no_grad():
        for parameter in model.parameters():  # all of them matter: no bias that is 0, no logits that are all alike
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_audio(rows=3, samples=4000):
    return torch.randn(rows, samples, generator=torch.Generator().manual_seed(0))


def make_sweeps(rows=4, samples=8000):
    """Tones that rise, each from another pitch: no frame of a window is like another."""
    seconds = torch.arange(samples) / 16000
    starts = torch.linspace(200, 900, rows)[:, None]
    return 0.5 * torch.sin(2 * torch.pi * (starts + 1500 * seconds) * seconds)


# ---- sizes


def test_parameters_of_the_published_model():
    """34 M (section 5.2); wav2vec's 32.5 M, one conv more and the quantizer."""
    with torch.device("meta"):
        model = VQWav2VecForPreTraining(VQWav2VecConfig())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 34_063_488 and round(count / 1e6) == 34
    conv = 512 * 512 + 2 * 512
    hidden, logits, codebook = 512 * 1024 + 1024, 1024 * 640 + 640, 320 * 256
    assert (
        sum(parameter.numel() for parameter in model.vq_wav2vec.quantizer.parameters()) == hidden + logits + codebook
    )
    assert count == 32_537_088 + conv + hidden + logits + codebook


def test_the_published_kmeans_model():
    with torch.device("meta"):
        model = VQWav2VecForPreTraining(VQWav2VecConfig(quantizer_type="kmeans"))
    count = sum(parameter.numel() for parameter in model.vq_wav2vec.quantizer.parameters())
    assert count == 512 * 256 + 2 * 512 + 320 * 256


def test_the_published_sizes():
    config = VQWav2VecConfig()
    assert (config.receptive_field, config.inputs_to_logits_ratio, config.first_step) == (465, 160, 3)
    assert (config.num_codevector_groups, config.num_codevectors_per_group, config.share_codevectors) == (2, 320, True)
    assert (config.quantizer_type, config.feat_extract_activation) == ("gumbel", "gelu")
    assert (config.conv_kernel[-3:], config.conv_stride[-3:]) == ([1, 1, 1], [1, 1, 1])
    assert config.context_kernel == list(range(2, 14)) and config.num_hidden_layers == 12
    assert (config.loss_type, config.num_negatives) == ("binary", 10)
    with torch.device("meta"):
        shared, own = (VQWav2VecModel(VQWav2VecConfig(share_codevectors=share)).quantizer for share in (True, False))
    assert (shared.codevectors.shape, own.codevectors.shape) == ((1, 320, 256), (2, 320, 256))


# ---- the loss


def naive_loss(context, frames, negatives, predictor, offset, steps, loss_type):
    """Section 3 with the quantized frames as targets and negatives: one positive after the other."""
    (rows, times, dim), every = frames.shape, frames.reshape(-1, frames.shape[2])
    losses = []
    for row in range(rows):
        for time in range(times):
            for step in range(steps):
                target = time + offset + step
                if target >= times:
                    continue
                weight = predictor.weight[step * dim : (step + 1) * dim]
                predicted = weight @ context[row, time] + predictor.bias
                own = predicted @ frames[row, target]
                others = [predicted @ every[place] for place in negatives[row, target - offset]]
                if loss_type == "binary":
                    loss = -torch.sigmoid(own).log() - sum((1 - torch.sigmoid(other)).log() for other in others)
                else:
                    loss = -(own.exp() / sum(value.exp() for value in [own, *others])).log()
                losses.append(loss)
    return losses


def naive_quantizer_loss(quantizer, features, codes):
    """Section 3.2's two terms, a value after the other, from the projected and normed frames and their codewords."""
    (batch, frames), groups = features.shape[:2], quantizer.groups
    normed = quantizer.norm(quantizer.projection(features.transpose(1, 2))).transpose(1, 2)
    books = quantizer.codevectors.expand(groups, -1, -1)
    pulling = committing = 0.0
    for row in range(batch):
        for time in range(frames):
            for group in range(groups):
                codeword = books[group, codes[row, time, group]]
                frame = normed[row, time].chunk(groups)[group]
                pulling = pulling + ((codeword - frame.detach()) ** 2).sum()
                committing = committing + ((frame - codeword.detach()) ** 2).sum()
    return (pulling + 0.25 * committing) / features.numel()


@KINDS
@pytest.mark.parametrize(
    "changed", [{}, {"loss_type": "infonce", "negatives_from": "batch", "share_codevectors": False}]
)
def test_loss_and_gradients_equal_a_naive_loop(kind, changed):
    model, audio = make_model(kind, **changed).train(), make_audio()
    encoder, config = model.vq_wav2vec, model.config
    torch.manual_seed(5)
    output = model(audio, seed=3)
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(5)
    features = encoder.encoder(audio)
    quantized = encoder.quantizer(features, sample=True)
    context = encoder.contextualize(quantized.frames).last_hidden_state
    negatives = draw_negatives(
        *features.shape[:2], config.first_step, 5, config.negatives_from, torch.Generator().manual_seed(3)
    )
    losses = naive_loss(context, quantized.frames, negatives, model.predictor, config.first_step, 4, config.loss_type)
    total, number = sum(losses), len(losses)
    means = {key: value.item() / output.num_targets for key, value in output.metrics.items()}
    assert means["contrastive_loss"] == pytest.approx(total.item() / number, rel=1e-4)
    if kind == "kmeans":
        quantizer_loss = naive_quantizer_loss(encoder.quantizer, features, quantized.codes)
        assert means["quantizer_loss"] == pytest.approx(quantizer_loss.item(), rel=1e-4)
        total = total + number * quantizer_loss
    total.backward()
    torch.testing.assert_close(output.loss, total, rtol=1e-4, atol=1e-4)
    assert output["loss"] is output.loss
    for name, parameter in model.named_parameters():
        largest = parameter.grad.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4 * largest)
    assert output.num_targets == number == model.count_targets(*audio.shape)
    assert output.num_frames == features.shape[:2].numel()


@KINDS
def test_metrics_are_named_and_equal_a_naive_count(kind):
    model, audio = make_model(kind).eval(), make_audio()
    output = model(audio, seed=0)
    assert tuple(output.metrics) == model.metric_names
    assert ("quantizer_loss" in model.metric_names) == (kind == "kmeans")
    assert not any(value.requires_grad or value.dim() for value in output.metrics.values())
    perplexities = []
    for group in model.vq_wav2vec.quantize(audio).flatten(0, 1).unbind(1):
        shares = [group.tolist().count(code) / len(group) for code in range(7)]
        perplexities.append(math.exp(-sum(share * math.log(share) for share in shares if share)))
    means = {key: value.item() / output.num_targets for key, value in output.metrics.items()}
    assert means["code_perplexity"] == pytest.approx(sum(perplexities), rel=1e-4)
    assert means["lowest_group_perplexity"] == pytest.approx(min(perplexities), rel=1e-4)
    assert min(perplexities) > 1.5


@KINDS
def test_a_fresh_model_is_near_chance(kind):
    torch.manual_seed(0)
    model = VQWav2VecForPreTraining(VQWav2VecConfig(**SMALL, quantizer_type=kind))
    output = model(make_audio(), seed=0)
    contrastive = output.metrics["contrastive_loss"].item() / output.num_targets
    assert contrastive == pytest.approx(chance_loss("binary", 5), rel=0.1)


@KINDS
def test_count_targets_is_what_forward_says(kind):
    model = make_model(kind)
    for rows, samples in ((1, 2000), (3, 4000), (2, 5003)):
        output = model(make_audio(rows, samples), seed=0)
        frames = 1 + (samples - model.config.receptive_field) // 160
        steps = [frames - model.config.first_step - step for step in range(4)]
        assert model.count_targets(rows, samples) == output.num_targets == rows * sum(steps)
        assert output.num_frames == rows * frames


@KINDS
def test_too_short_a_window_is_one_line(kind):
    model = make_model(kind)
    needed = model.config.first_step + 4
    samples = model.config.receptive_field + (needed - 1) * 160
    assert model(make_audio(2, samples), seed=0).num_targets == 2 * (1 + 2 + 3 + 4)
    assert model.count_targets(2, samples - 1) == model.count_targets(2, 10) == 0
    with pytest.raises(ValueError, match=f"{samples - 1} samples are {needed - 1} frames; .* takes {needed}$"):
        model(make_audio(2, samples - 1))


# ---- training


@pytest.mark.parametrize(
    ("kind", "highest_loss", "lowest_accuracy"),
    # Gumbel: fewer codes in use, so more negatives that sound like the target.
    [("gumbel", 0.5, 0.5), ("kmeans", 0.3, 0.75)],
)
def test_it_overfits_a_toy_set(kind, highest_loss, lowest_accuracy):
    torch.manual_seed(0)
    values = {**SMALL, "conv_dim": [32] * 3, "hidden_size": 32, "num_codevectors_per_group": 16}
    config = VQWav2VecConfig(**values, quantizer_type=kind, loss_type="infonce")
    model, audio = VQWav2VecForPreTraining(config).train(), make_sweeps(2, 6000)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for update in range(150):
        if model.anneals:
            model.set_gumbel_temperature(max(2 * 0.985**update, 0.5))
        output = model(audio, seed=update)
        (output.loss / output.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    output = model.eval()(audio, seed=1000)
    assert output.metrics["contrastive_loss"] / output.num_targets < highest_loss * chance_loss("infonce", 5)
    assert output.metrics["accuracy"] / output.num_targets > lowest_accuracy
    assert output.metrics["code_perplexity"] / output.num_targets > 5


@KINDS
def test_every_parameter_has_a_gradient(kind):
    for changed in (
        {},
        {"conv_dim": [12, 16, 16], "loss_type": "infonce", "feat_extract_norm": "channel", "context_norm": "channel"},
        {"share_codevectors": False, "num_codevector_groups": 4, "conv_bias": True, "feat_extract_norm": "none"},
    ):
        model = make_model(kind, **changed).train()
        model(make_audio(), seed=0).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name


@KINDS
def test_targets_follow_the_seed(kind):
    """In eval mode; in training a Gumbel quantizer draws its codes besides."""
    model, audio = make_model(kind).eval(), make_audio()
    losses = [model(audio, seed=seed).loss.item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(5)
    drawn = [model(audio).loss.item() for _ in range(2)]
    torch.manual_seed(5)
    assert model(audio).loss.item() == drawn[0] != drawn[1]
    model.train()
    noisy = [model(audio, seed=1).loss.item() for _ in range(2)]
    assert (noisy[0] == noisy[1] == losses[0]) == (kind == "kmeans")
    assert (noisy[0] != noisy[1]) == (kind == "gumbel")


def test_the_temperature_reaches_the_quantizer():
    model, audio = make_model().train(), make_audio()
    gradients = []
    for temperature in (2.0, 0.5):
        model.set_gumbel_temperature(temperature)
        model.zero_grad()
        torch.manual_seed(0)
        model(audio, seed=0).loss.backward()
        gradients.append(model.vq_wav2vec.quantizer.hidden.weight.grad.clone())
    assert not torch.allclose(*gradients)
    assert isinstance(model.vq_wav2vec.quantizer.temperature, torch.Tensor)
    assert model.anneals and not make_model("kmeans").anneals


@KINDS
def test_half_precision_stays_near(kind):
    model, audio = make_model(kind, num_codevectors_per_group=3).eval(), make_audio()
    exact = model(audio, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(audio, seed=0)
        half.loss.backward()
    assert half.loss.dtype == torch.float32
    assert half.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_compiled_equals_eager():
    """The convs and the context; no quantizer is compiled."""
    model, audio = make_model().train(), make_audio()

    def loss_and_gradients():
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(audio, seed=0).loss
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]

    expected = loss_and_gradients()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_regions(backend="aot_eager")
    loss, gradients = loss_and_gradients()
    assert loss == pytest.approx(expected[0], rel=1e-4)
    for mine, other in zip(gradients, expected[1]):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@KINDS
def test_nothing_waits_for_the_device(kind):
    """No operator's output size depends on values, and no value is read."""
    model, audio = make_model(kind).train(), make_audio()
    waits = {"aten::nonzero", "aten::_local_scalar_dense", "aten::unique2", "aten::masked_select"}
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(f"aten::{function.__name__.split('.')[0]}")
            return function(*args, **(kwargs or {}))

    with Watch():
        if model.anneals:
            model.set_gumbel_temperature(1.0)
        model(audio, seed=1).loss.backward()
    assert "aten::bmm" in seen and ("aten::exponential" in seen or "aten::exponential_" in seen) == model.anneals
    assert not waits & set(seen)


# ---- the encoder


@KINDS
@pytest.mark.parametrize("norm", ["group", "channel", "none"])
def test_a_padded_clip_equals_itself_alone(kind, norm):
    encoder = make_model(kind, feat_extract_norm=norm).vq_wav2vec.eval()
    audio, lengths = make_audio(), torch.tensor([4000, 1500, 2900])
    attention_mask = (torch.arange(4000) < lengths[:, None]).long()
    audio = audio * attention_mask
    with torch.no_grad():
        outputs = encoder(audio, attention_mask, output_hidden_states=True)
        codes = encoder.quantize(audio, attention_mask)
        real = encoder._get_feature_vector_attention_mask(codes.shape[1], attention_mask)
        assert real.sum(1).tolist() == encoder._get_feat_extract_output_lengths(lengths).tolist()
        for row, length in enumerate(lengths.tolist()):
            alone = encoder(audio[row : row + 1, :length], output_hidden_states=True)
            assert alone.last_hidden_state.shape[1] == encoder._get_feat_extract_output_lengths(length)
            assert torch.equal(codes[row, real[row]], encoder.quantize(audio[row : row + 1, :length])[0])
            for mine, other in zip(outputs.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(mine[row, real[row]], other[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "norm", "sees_all"),
    [("gumbel", "channel", False), ("gumbel", "group", True), ("kmeans", "channel", True)],
)
def test_what_a_frame_sees(kind, norm, sees_all):
    """With channel norms the past only. Group norms let the future in by their mean and variance; k-means has one."""
    encoder = make_model(kind, feat_extract_norm=norm, context_norm=norm).vq_wav2vec.eval()
    audio, frame = make_audio(1).requires_grad_(), 10
    encoder(audio).last_hidden_state[0, frame].square().sum().backward()
    last_sample = frame * 160 + encoder.config.receptive_field
    assert audio.grad[0, :last_sample].any()
    assert audio.grad[0, last_sample:].any() == sees_all


def test_the_context_of_frames_sees_the_past_only():
    encoder = make_model("kmeans", context_norm="channel").vq_wav2vec.eval()
    features = torch.randn(2, 12, 20, requires_grad=True)
    encoder.contextualize(features).last_hidden_state[1, 7].square().sum().backward()
    seen = features.grad.abs().sum(-1) > 0
    assert not seen[0].any() and not seen[1, 8:].any()
    assert seen[1, 5:8].all()  # kernels of 2 and 3 reach three frames back


@KINDS
def test_codes_are_the_same_each_time(kind):
    """Also in training mode and without gradients; they name what `extract_features` gives."""
    model, audio = make_model(kind), make_audio()
    encoder = model.vq_wav2vec
    codes = encoder.eval().quantize(audio)
    assert codes.dtype == torch.int64 and codes.shape == (3, encoder._get_feat_extract_output_lengths(4000), 2)
    assert torch.equal(encoder.train().quantize(audio), codes)
    assert codes.min() >= 0 and codes.max() <= 6 and len(codes.unique()) > 3
    book, features = encoder.quantizer.codevectors[0], encoder.extract_features(audio)
    torch.testing.assert_close(features, book[codes].flatten(2))
    assert torch.equal(model.code_usage(audio), count_codes(codes, 7))
    assert model.code_usage(audio).shape == model.codes == (2, 7)


@KINDS
@pytest.mark.parametrize("width", [16, 20])
def test_hidden_states_are_as_many_as_the_config_says_and_as_wide(kind, width):
    encoder = make_model(kind, conv_dim=[12, 16, width]).vq_wav2vec.eval()
    outputs = encoder(make_audio(), output_hidden_states=True)
    assert len(outputs.hidden_states) == encoder.config.num_hidden_states == (3 if width == 16 else 2)
    assert {states.shape[2] for states in outputs.hidden_states} == {16}
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert encoder(make_audio()).hidden_states is None
    assert encoder.extract_features(make_audio()).shape[2] == encoder.config.feature_size == width


@KINDS
def test_checkpoints_are_read_back(kind, tmp_path):
    model, audio = make_model(kind, share_codevectors=False).eval(), make_audio()
    model.save_pretrained(tmp_path)
    again, info = VQWav2VecForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    values = (config.to_dict() for config in (model.config, VQWav2VecConfig.from_pretrained(tmp_path)))
    mine, read = ({key: value[key] for key in VQWav2VecConfig().to_dict()} for value in values)
    assert {**mine, "architectures": None} == {**read, "architectures": None}
    assert again.eval()(audio, seed=0).loss == model(audio, seed=0).loss
    encoder, info = VQWav2VecModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and all(key.startswith("predictor.") for key in info["unexpected_keys"])
    assert torch.equal(encoder.eval()(audio).last_hidden_state, model.vq_wav2vec(audio).last_hidden_state)
    assert torch.equal(encoder.quantize(audio), model.vq_wav2vec.quantize(audio))


@KINDS
def test_a_frozen_front_end_does_not_train(kind):
    model = make_model(kind).train()
    model.vq_wav2vec.freeze_feature_encoder()
    model(make_audio(), seed=0).loss.backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("vq_wav2vec.encoder.", "vq_wav2vec.quantizer."))
        assert (parameter.grad is None) == frozen == (not parameter.requires_grad)


def test_what_a_run_asks_a_model():
    model = make_model()
    assert (model.family, model.normalizes_audio, model.base_model_prefix) == ("predictive", False, "vq_wav2vec")
    assert model.get_input_embeddings() is None and model.base_model.get_input_embeddings() is None
    assert model.config.model_type == "vq_wav2vec" and model.config.inputs_to_logits_ratio == 160


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"context_kernel": []}, "context_kernel needs a value"),
        ({"context_kernel": [3, 0]}, "context_kernel must be at least 1"),
        ({"context_norm": "layer"}, "context_norm must be one of group, channel, none"),
        ({"quantizer_type": "lloyd"}, "quantizer_type must be one of gumbel, kmeans, not 'lloyd'"),
        ({"num_codevector_groups": 0}, "num_codevector_groups must be at least 1"),
        ({"num_codevectors_per_group": 0}, "num_codevectors_per_group must be at least 1"),
        ({"num_codevector_groups": 3}, "conv_dim ends with 512, not a multiple of num_codevector_groups 3"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"conv_stride": [5, 4]}, "conv_dim, conv_kernel and conv_stride need one value for each layer"),
        ({"feat_extract_activation": "swish"}, "feat_extract_activation must be one of relu, gelu"),
    ],
)
def test_impossible_values_are_one_line(values, words):
    with pytest.raises(ValueError, match=words) as caught:
        VQWav2VecConfig(**values)
    assert "\n" not in str(caught.value)

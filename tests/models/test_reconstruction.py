"""What Mockingjay and Audio ALBERT share: what is hidden of a window, the loss on it, and how the models run."""

import itertools
import math
from collections import Counter

import pytest
import torch

from acoustic.models.audio_albert import AudioAlbertConfig, AudioAlbertForPreTraining
from acoustic.models.mockingjay import MockingjayConfig, MockingjayForPreTraining
from acoustic.models.reconstruction import ReconstructionConfig, draw_corruption, draw_starts, sinusoids

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SYSTEMS = {
    "mockingjay": (MockingjayConfig, MockingjayForPreTraining),
    "audio_albert": (AudioAlbertConfig, AudioAlbertForPreTraining),
}


def make_model(system, **values):
    config_class, model_class = SYSTEMS[system]
    torch.manual_seed(0)
    return model_class(config_class(**{**SMALL, **values}))


@pytest.fixture(params=SYSTEMS)
def system(request):
    return request.param


def make_audio(batch=3, seconds=1.0):
    """Melodies: half a second of five tones, again and again from another tone."""
    time = torch.arange(8000) / 16_000
    pitches = torch.tensor([300.0, 500.0, 900.0, 1500.0, 2500.0])[(time / 0.1).long()]
    melody = torch.sin(2 * torch.pi * pitches * time)
    places = torch.arange(int(seconds * 16_000)) + 1600 * torch.arange(batch)[:, None]
    return melody[places % 8000]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- what is hidden


def test_spans_are_whole_apart_and_as_many_in_every_row():
    starts = draw_starts(500, 100, 9, 7, seeded())
    assert starts.min() >= 0 and starts.max() + 7 <= 100
    assert (starts.diff(dim=1) >= 7).all()
    assert (starts.diff(dim=1) == 7).any()  # they may touch
    hidden = torch.zeros(500, 100).scatter_(1, (starts[..., None] + torch.arange(7)).flatten(1), 1)
    assert (hidden.sum(1) == 63).all()
    # But for the ends, which fewer spans can cover, frames are hidden alike.
    assert hidden.mean(0)[10:-10].std() < 0.04


def test_all_arrangements_of_spans_are_equally_likely():
    drawn = Counter(map(tuple, draw_starts(20_000, 9, 2, 3, seeded()).tolist()))
    every = [pair for pair in itertools.combinations(range(7), 2) if pair[1] - pair[0] >= 3]
    assert set(drawn) == set(every)
    assert max(drawn.values()) < 1.15 * 20_000 / len(every) and min(drawn.values()) > 0.85 * 20_000 / len(every)


@pytest.mark.parametrize(("prob", "length", "frames"), [(0.15, 7, 1498), (0.15, 7, 498), (0.3, 5, 98), (0.15, 7, 98)])
def test_the_share_that_is_chosen_is_the_one_asked_for(prob, length, frames):
    config = ReconstructionConfig(mask_time_prob=prob, mask_time_length=length)
    chosen = config.count_spans(frames) * length
    assert abs(chosen - prob * frames) <= length / 2
    assert draw_corruption(4, frames, config, seeded()).places.shape == (4, chosen)


def test_at_least_one_span_and_something_to_tell_it_from():
    config = ReconstructionConfig()
    assert [config.count_spans(frames) for frames in (0, 6, 7, 8, 30)] == [0, 0, 0, 1, 1]
    everything = ReconstructionConfig(mask_time_prob=1.0)
    for frames in range(8, 40):
        assert 0 < everything.count_spans(frames) * 7 < frames
        assert draw_starts(2, frames, everything.count_spans(frames), 7, seeded()).max() + 7 <= frames


def test_one_die_for_each_window():
    config = ReconstructionConfig()
    drawn = draw_corruption(4000, 50, config, seeded())
    assert drawn.is_zeroed.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert drawn.is_replaced.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert not (drawn.is_zeroed & drawn.is_replaced).any()
    places, others = (frames.unflatten(1, (-1, 7)) for frames in (drawn.places, drawn.others))
    assert (others.diff(dim=2) == 1).all() and others.min() == 0 and others.max() == 49
    assert (others != places).all()  # elsewhere


@pytest.mark.parametrize("stacking", [1, 2])
@pytest.mark.parametrize("mask_bands", [0.0, 0.25])
def test_corruption_equals_a_loop_from_the_definition(mask_bands, stacking):
    config = ReconstructionConfig(num_deltas=1, frame_stacking=stacking, mask_bands=mask_bands, mask_zero_prob=0.4,
                                  mask_replace_prob=0.3)  # fmt: skip
    frames = torch.randn(30, 60, config.feature_size)
    drawn = draw_corruption(30, 60, config, seeded())
    expected, cases = frames.clone(), Counter()
    for row in range(30):
        for place, other in zip(drawn.places[row], drawn.others[row]):
            if drawn.is_zeroed[row]:
                expected[row, place] = 0
            elif drawn.is_replaced[row]:
                expected[row, place] = frames[row, other]
        cases[bool(drawn.is_zeroed[row]), bool(drawn.is_replaced[row])] += 1
        if mask_bands:
            first = int(drawn.first_band[row])
            for part in range(2 * stacking):  # the bands and their deltas, of each frame of a stack
                expected[row, :, part * 80 + first : part * 80 + first + 20] = 0
    assert len(cases) == 3
    assert torch.equal(drawn.apply(frames, config), expected)


def test_hidden_bands_lie_anywhere():
    drawn = draw_corruption(2000, 50, ReconstructionConfig(mask_bands=0.25), seeded())
    assert drawn.first_band.min() == 0 and drawn.first_band.max() == 60


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size 30 must be even, and a multiple"),
        ({"target": "mel"}, "target must be one of input, linear, not 'mel'"),
        ({"mask_zero_prob": 1.2}, "mask_zero_prob must be a share, from 0 to 1, not 1.2"),
        ({"mask_zero_prob": 0.8, "mask_replace_prob": 0.3}, "can't be above 1"),
        ({"mask_bands": 1.0}, "mask_bands 1 would hide all of the 80"),
        ({"mask_time_length": 0}, "mask_time_length must be a whole number from 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"hidden_act": "gellu"}, "hidden_act 'gellu'"),
    ],
)
def test_configs_that_cannot_be(system, values, words):
    with pytest.raises(ValueError, match=words) as error:
        SYSTEMS[system][0](**values)
    assert "\n" not in str(error.value)


# ---- the loss


@pytest.mark.parametrize("values", [{}, {"target": "linear"}, {"frame_stacking": 2, "mask_bands": 0.2}])
def test_loss_equals_a_loop_from_the_definition(system, values):
    """All frames through all layers; then L1 over the cells of each chosen frame, one after the other."""
    model, audio = make_model(system, **values).eval(), make_audio()
    with torch.no_grad():
        output = model(audio, seed=7)
        features, target = model.read(audio)
        drawn = model.draw_corruption(3, features.shape[1], 7)
        hidden = model.base_model.contextualize(drawn.apply(features, model.config)).last_hidden_state
        prediction = model.head(hidden)
    assert prediction.shape == target.shape and target.shape[2] == model.config.target_size
    loss = of_mean = 0.0
    for row in range(3):
        for frame in drawn.places[row].tolist():
            cells = target[row, frame].tolist()
            loss += sum(abs(a - b) for a, b in zip(prediction[row, frame].tolist(), cells)) / len(cells)
            of_mean += sum(map(abs, cells)) / len(cells)
    assert output.num_targets == drawn.places.numel() == model.count_targets(*audio.shape)
    assert output.num_frames == 3 * features.shape[1]
    assert output.loss.item() == pytest.approx(loss, rel=1e-5)
    assert tuple(output.metrics) == model.metric_names
    assert output.metrics["reconstruction_loss"].item() == pytest.approx(loss, rel=1e-5)
    assert output.metrics["mean_predictor_loss"].item() == pytest.approx(of_mean, rel=1e-5)
    assert not any(value.requires_grad or value.dim() for value in output.metrics.values())


def test_frames_that_are_not_chosen_have_no_loss(system):
    """Their target does not matter; that of the chosen does."""
    model, audio = make_model(system).eval(), make_audio()
    features, target = model.read(audio)
    places = model.draw_corruption(3, features.shape[1], 7).places
    chosen = torch.zeros(features.shape[:2], dtype=torch.bool).scatter_(1, places, True)[..., None]
    losses = []
    for changed in (target, target + 1 * ~chosen, target + 1 * chosen):
        model.read = lambda _, changed=changed: (features, changed)
        losses.append(model(audio, seed=7).loss.item())
    assert losses[0] == losses[1] != losses[2]


def test_a_model_of_zeros_is_the_mean_predictor(system):
    model = make_model(system).eval()
    for parameter in model.head.output.parameters():
        torch.nn.init.zeros_(parameter)
    metrics = model(make_audio(), seed=0).metrics
    torch.testing.assert_close(metrics["reconstruction_loss"], metrics["mean_predictor_loss"])


def test_overfits_a_melody(system):
    model = make_model(system, **NO_DROPOUT, hidden_size=64, num_attention_heads=4, intermediate_size=128)
    audio, updates = make_audio(), 400
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=updates)
    for update in range(updates):
        output = model(audio, seed=update)
        (output.loss / output.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval().config.mask_zero_prob = 1.0  # where nothing of a chosen frame is left to copy
    loss, of_mean = (sum(model(audio, seed=-seed).metrics[name] for seed in (1, 2, 3)) for name in model.metric_names)
    assert loss < 0.6 * of_mean


def test_every_parameter_has_a_gradient(system):
    model = make_model(system)
    model(make_audio(), seed=0).loss.backward()
    for name, parameter in model.named_parameters():
        if "key.bias" not in name:  # the softmax takes out what is the same for all keys
            assert parameter.grad is not None and parameter.grad.any(), name


def test_the_seed_draws_everything_but_dropout(system):
    model, audio = make_model(system, **NO_DROPOUT), make_audio()
    losses = [model(audio, seed=seed).loss.item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(0)
    drawn = [model(audio).loss.item() for _ in range(2)]
    torch.manual_seed(0)
    assert drawn[0] != drawn[1] and [model(audio).loss.item() for _ in range(2)] == drawn


def test_nothing_is_counted_on_the_device(system):
    """No operator's output size depends on values: what would wait for a GPU."""
    model, audio = make_model(system, mask_bands=0.1), make_audio()
    model(audio, seed=0)
    waits = {"aten::nonzero", "aten::item", "aten::_local_scalar_dense", "aten::unique2", "aten::masked_select"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(audio, seed=1).loss.backward()
    seen = {event.key for event in profile.key_averages()}
    assert "aten::topk" in seen
    assert not waits & seen


def test_windows_that_are_too_short(system):
    model = make_model(system)
    assert model.count_targets(3, 300) == model.count_targets(3, 400 + 6 * 160) == 0
    with pytest.raises(ValueError, match="a window of 7 frames is too short: .* span of 7"):
        model(torch.randn(2, 400 + 6 * 160), seed=0)
    with pytest.raises(ValueError, match="300 samples are too few"):
        model(torch.randn(2, 300), seed=0)
    assert model(torch.randn(2, 400 + 7 * 160), seed=0).num_targets == 14
    with pytest.raises(ValueError, match="attention_mask: not taken in pretraining"):
        model(make_audio(), attention_mask=torch.ones(3, 16_000))


def test_half_precision_stays_near(system):
    model, audio = make_model(system).eval(), make_audio()
    exact = model(audio, seed=0).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(audio, seed=0).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)


def test_compiled_regions_equal_eager(system):
    model, audio = make_model(system, **NO_DROPOUT), make_audio()
    expected = model(audio, seed=0).loss
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.compile_regions(backend="aot_eager")
    loss = model(audio, seed=0).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for gradient, parameter in zip(gradients, model.parameters()):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(system):
    model, audio = make_model(system, **NO_DROPOUT).train(), make_audio()
    expected = model(audio, seed=0).loss
    model.gradient_checkpointing_enable()
    loss = model(audio, seed=0).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert model.base_model.input_layer.projection.weight.grad.any()


@pytest.mark.parametrize("values", [{}, {"target": "linear", "num_deltas": 0}, {"frame_stacking": 3}])
def test_examples_for_the_figure(system, values):
    model = make_model(system, **values).train()
    example = model.training_examples(make_audio(2), seed=3)
    frames = example["target"].shape[0]
    assert frames == 98 // model.config.frame_stacking * model.config.frame_stacking
    bands = 201 if model.config.target == "linear" else 80
    assert example["prediction"].shape == example["target"].shape == (frames, bands)
    assert example["input"].shape == (frames, 80) and example["chosen"].shape == (frames,)
    assert example["hop_seconds"] == 0.01 and model.training
    assert not example["input"][example["chosen"]].any() and example["input"][~example["chosen"]].all(1).any()
    assert example["chosen"].sum() == model.count_targets(1, 16_000) * model.config.frame_stacking
    again = model.training_examples(make_audio(2), seed=3)
    assert all((again[name] == example[name]).all() for name in ("input", "prediction"))


# ---- the encoder


def test_padding_changes_nothing(system):
    encoder = make_model(system).base_model.eval()
    audio, lengths = make_audio(3), [16_000, 9000, 4321]
    mask = (torch.arange(16_000) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        padded = encoder(audio + (1 - mask) * 3, mask, output_hidden_states=True)
        for row, length in enumerate(lengths):
            alone = encoder(audio[row : row + 1, :length], output_hidden_states=True)
            frames = encoder._get_feat_extract_output_lengths(length)
            assert alone.last_hidden_state.shape == (1, frames, 32)
            for together, single in zip(padded.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(together[row, :frames], single[0], rtol=1e-3, atol=1e-4)
    real = encoder._get_feature_vector_attention_mask(98, mask)
    assert real.sum(1).tolist() == encoder._get_feat_extract_output_lengths(torch.tensor(lengths)).tolist()


def test_chosen_frames_equal_those_of_the_whole(system):
    encoder, audio = make_model(system).base_model.eval(), make_audio()
    features = encoder.extract_features(audio)
    places = torch.randint(98, (3, 20)).sort(dim=1).values
    mask = torch.arange(98) < torch.tensor([98, 90, 95])[:, None]
    for frame_mask in (None, mask):
        whole = encoder.contextualize(features, frame_mask).last_hidden_state
        some = encoder.contextualize(features, frame_mask, places=places).last_hidden_state
        torch.testing.assert_close(some, whole[torch.arange(3)[:, None], places])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_kinds_of_attention_agree(system, attention):
    config_class, model_class = SYSTEMS[system]
    model = make_model(system).eval()
    other = model_class._from_config(config_class(**SMALL), attn_implementation=attention).eval()
    other.load_state_dict(model.state_dict())
    audio = make_audio()
    torch.testing.assert_close(other(audio, seed=0).loss, model(audio, seed=0).loss)


def test_time_and_positions_matter(system):
    encoder = make_model(system).base_model.eval()
    features = encoder.extract_features(make_audio())
    with torch.no_grad():
        hidden = encoder.contextualize(features).last_hidden_state
        turned = encoder.contextualize(features.flip(1)).last_hidden_state.flip(1)
        changed = features.clone()
        changed[:, 50] += 1
        reached = (encoder.contextualize(changed).last_hidden_state - hidden).abs().amax(-1)
    assert (hidden - turned).abs().max() > 0.1  # without positions the two were equal
    assert (reached > 0).all()  # both ways in time, within a window
    changed = features.clone()
    changed[0] += 1
    with torch.no_grad():
        assert torch.equal(encoder.contextualize(changed).last_hidden_state[1:], hidden[1:])


def test_hidden_states_are_the_layers_input_and_outputs(system):
    encoder, audio = make_model(system, num_hidden_layers=3).base_model.eval(), make_audio()
    outputs = encoder(audio, output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    assert {states.shape for states in outputs.hidden_states} == {(3, 98, 32)}
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert torch.equal(outputs.hidden_states[0], encoder.input_layer(encoder.extract_features(audio)))
    assert encoder(audio).hidden_states is None


def test_sinusoids_are_those_of_the_transformer():
    table = sinusoids(50, 8, "cpu")
    for position, pair in itertools.product((0, 7, 49), range(4)):
        angle = position / 10_000 ** (2 * pair / 8)
        assert table[position, pair].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[position, 4 + pair].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_dropout_is_on_in_training_only(system):
    model, audio = make_model(system).train(), make_audio()
    assert model(audio, seed=0).loss != model(audio, seed=0).loss
    model.eval()
    assert model(audio, seed=0).loss == model(audio, seed=0).loss


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_and_loaded_it_is_the_same(system, tmp_path, dtype):
    config_class, model_class = SYSTEMS[system]
    model, audio = make_model(system, mask_bands=0.1, sampling_rate=24_000).eval(), make_audio()
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, after = ({**other.config.to_dict(), "dtype": None, "_name_or_path": ""} for other in (model, loaded))
    assert before == after
    encoder, info = type(model.base_model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and all(key.startswith("head.") for key in info["unexpected_keys"])
    features = model.base_model.extract_features(audio)
    for other in (loaded.base_model, encoder):  # its constants are in no checkpoint
        assert torch.equal(other.extract_features(audio), features)
    torch.testing.assert_close(encoder(audio).last_hidden_state, model.base_model(audio).last_hidden_state)
    loss = model(audio, seed=0).loss
    assert loaded(audio, seed=0).loss.item() == pytest.approx(loss.item(), rel=1e-6 if dtype is None else 0.02)
    assert config_class.from_pretrained(tmp_path).mask_bands == 0.1


def test_what_a_run_asks_of_it(system):
    model = make_model(system)
    assert (model.family, model.normalizes_audio, model.main_input_name) == ("reconstruction", False, "input_values")
    assert model.get_input_embeddings() is model.base_model.get_input_embeddings() is None
    assert model.base_model_prefix == system == model.config.model_type
    model.base_model.freeze_feature_encoder()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {type(layer).__name__ for layer in model.base_model.layers} == set(model._no_split_modules)

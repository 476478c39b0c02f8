"""wav2vec: published sizes, steps ahead, what the context sees, and that it learns."""

import math

import pytest
import torch

from acoustic.models.wav2vec import Wav2VecConfig, Wav2VecForPreTraining, Wav2VecModel

CONVS = {"conv_dim": [32, 32, 32], "conv_kernel": [20, 8, 4], "conv_stride": [10, 4, 4]}  # 160 samples a frame
SMALL = {**CONVS, "hidden_size": 32, "context_kernel": [2, 3, 4], "num_steps": 4}


def make_sweeps(rows=4, samples=8000):
    """Tones that rise, each from another pitch: no frame of a window is like another."""
    seconds = torch.arange(samples) / 16000
    starts = torch.linspace(200, 900, rows)[:, None]
    return 0.5 * torch.sin(2 * torch.pi * (starts + 1500 * seconds) * seconds)


def make_encoder(**changed):
    torch.manual_seed(0)
    return Wav2VecModel(Wav2VecConfig(**{**SMALL, **changed})).eval()


def test_parameters_of_the_published_model():
    """wav2vec large: 32.54 M in SUPERB's table (Yang 2021, arXiv 2105.01051, table 1), which has the head with it."""
    with torch.device("meta"):
        model = Wav2VecForPreTraining(Wav2VecConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 32_537_088
    # Convs over the waveform: 22 taps of 512 x 512 and the first layer's 10; two numbers of 7 norms.
    assert sum(parameter.numel() for parameter in model.wav2vec.encoder.parameters()) == 5_779_456


def test_the_papers_convs_predict_3_to_14_frames_ahead():
    config = Wav2VecConfig()
    assert (config.first_step, config.first_step + config.num_steps - 1) == (3, 14)
    assert (config.receptive_field, config.inputs_to_logits_ratio) == (465, 160)
    assert config.num_hidden_layers == 12


def test_a_predicted_frame_shares_no_sample_with_what_was_seen():
    """Else a step ahead could be copied: the context at t ends with frame t, the first target begins behind it."""
    for values in ({}, SMALL, {"conv_kernel": [10, 8, 4, 4, 4, 1, 3]}):
        config = Wav2VecConfig(**values)
        stride = config.inputs_to_logits_ratio
        assert config.first_step * stride >= config.receptive_field > (config.first_step - 1) * stride


@pytest.mark.parametrize(("norms", "sees_all"), [("channel", False), ("group", True)])
def test_what_a_frame_sees(norms, sees_all):
    """With channel norms the past only. Group norms let the future in by their mean and variance, as published."""
    encoder = make_encoder(feat_extract_norm=norms, context_norm=norms)
    audio = torch.randn(1, 4000, requires_grad=True)
    frame = 10
    encoder(audio).last_hidden_state[0, frame].square().sum().backward()
    last_sample = frame * 160 + encoder.config.receptive_field
    assert audio.grad[0, :last_sample].any()
    assert audio.grad[0, last_sample:].any() == sees_all


def test_features_then_the_context_are_the_hidden_states():
    encoder, audio = make_encoder(), make_sweeps()
    states = encoder(audio, output_hidden_states=True).hidden_states
    assert len(states) == 1 + 3
    assert torch.equal(states[0], encoder.extract_features(audio))
    assert len(make_encoder(hidden_size=24)(audio, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize(
    ("loss_type", "updates", "highest_loss", "lowest_accuracy"),
    # Binary: who can't tell them apart is at 3.35 nats at best, and there it stays for its first 100 updates.
    [("binary", 350, 1.7, 0.6), ("infonce", 120, 0.1 * math.log(11), 0.95)],
)
def test_it_overfits_a_toy_set(loss_type, updates, highest_loss, lowest_accuracy):
    torch.manual_seed(0)
    model, audio = Wav2VecForPreTraining(Wav2VecConfig(**SMALL, loss_type=loss_type)).train(), make_sweeps(2, 6000)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2 if loss_type == "binary" else 5e-3)
    for update in range(updates):
        output = model(audio, seed=update)
        (output.loss / output.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    output = model.eval()(audio, seed=1000)
    assert output.metrics["contrastive_loss"] / output.num_targets < highest_loss
    assert output.metrics["accuracy"] / output.num_targets > lowest_accuracy


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"context_kernel": []}, "context_kernel needs a value"),
        ({"context_kernel": [3, 0]}, "context_kernel must be at least 1"),
        ({"context_norm": "layer"}, "context_norm must be one of group, channel, none"),
    ],
)
def test_impossible_values_are_one_line(values, words):
    with pytest.raises(ValueError, match=words) as caught:
        Wav2VecConfig(**values)
    assert "\n" not in str(caught.value)

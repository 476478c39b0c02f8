"""CPC: published sizes, a context that runs over time and sees the past only, and that it learns."""

import pytest
import torch

from acoustic.models.cpc import CPCConfig, CPCForPreTraining, CPCModel
from acoustic.models.predictive import chance_loss

CONVS = {"conv_dim": [32, 32, 32], "conv_kernel": [20, 8, 4], "conv_stride": [10, 4, 4]}  # 160 samples a frame
SMALL = {**CONVS, "hidden_size": 32, "num_steps": 4, "num_negatives": 16}


def make_sweeps(rows=4, samples=8000):
    """Tones that rise, each from another pitch: no frame of a window is like another."""
    seconds = torch.arange(samples) / 16000
    starts = torch.linspace(200, 2000, rows)[:, None]
    return 0.5 * torch.sin(2 * torch.pi * (starts + 1500 * seconds) * seconds)


def make_encoder(**changed):
    torch.manual_seed(0)
    return CPCModel(CPCConfig(**{**SMALL, **changed})).eval()


def test_parameters_of_the_published_models():
    """The modified CPC (Riviere 2020): 1.84 M in SUPERB's table (Yang 2021, arXiv 2105.01051, table 1), by an LSTM
    and without the head. The paper's own: 5 convs of 512, a GRU of 256, twelve matrices of 512 x 256."""
    with torch.device("meta"):
        modified = CPCModel(CPCConfig(conv_dim=[256] * 5, feat_extract_norm="channel", context_type="lstm"))
        model = CPCForPreTraining(CPCConfig())
    assert sum(parameter.numel() for parameter in modified.parameters()) == 1_843_456
    convs = 512 * 10 + 512 * 512 * (8 + 4 + 4 + 4) + 5 * 512
    gru = 3 * 256 * (512 + 256 + 2)
    assert sum(parameter.numel() for parameter in model.parameters()) == convs + gru + 12 * 512 * 256


def test_the_papers_window():
    """20,480 samples (section 3.1), 126 frames without padding; the 12 next ones from each."""
    with torch.device("meta"):
        model = CPCForPreTraining(CPCConfig())
    assert model.count_frames(20_480) == 126
    assert model.count_targets(8, 20_480) == 8 * sum(126 - step for step in range(1, 13))
    assert model.config.first_step == 1


@pytest.mark.parametrize("context_type", ["gru", "lstm"])
def test_the_context_runs_over_time(context_type):
    """Over the batch, as without `batch_first`, a window would depend on the one before it and on no earlier frame."""
    encoder = make_encoder(context_type=context_type, num_hidden_layers=2)
    features = torch.randn(3, 12, 32, requires_grad=True)
    context = encoder.contextualize(features).last_hidden_state
    for row in range(3):
        alone = encoder.contextualize(features[row : row + 1]).last_hidden_state
        torch.testing.assert_close(context[row], alone[0])
    context[1, 7].sum().backward()
    seen = features.grad.abs().sum(-1) > 0
    expected = torch.zeros(3, 12, dtype=torch.bool)
    expected[1, :8] = True
    assert torch.equal(seen, expected)


def test_the_gru_equals_its_equations():
    """Cho 2014 (arXiv 1406.1078), step by step."""
    encoder = make_encoder()
    (layer,) = encoder.context
    features, hidden = torch.randn(2, 6, 32), torch.zeros(2, 32)
    outputs = encoder.contextualize(features).last_hidden_state
    for time_step in range(6):
        inputs = features[:, time_step] @ layer.weight_ih_l0.T + layer.bias_ih_l0
        states = hidden @ layer.weight_hh_l0.T + layer.bias_hh_l0
        (reset, update, new), (past_reset, past_update, past) = inputs.chunk(3, 1), states.chunk(3, 1)
        update = torch.sigmoid(update + past_update)
        new = torch.tanh(new + torch.sigmoid(reset + past_reset) * past)
        hidden = (1 - update) * new + update * hidden
        torch.testing.assert_close(outputs[:, time_step], hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_nothing_comes_from_the_future(norm):
    encoder = make_encoder(feat_extract_norm=norm)
    audio = torch.randn(1, 4000, requires_grad=True)
    frame = 10
    encoder(audio).last_hidden_state[0, frame].square().sum().backward()
    last_sample = frame * 160 + encoder.config.receptive_field
    assert audio.grad[0, :last_sample].any()
    assert not audio.grad[0, last_sample:].any()


def test_hidden_states_are_those_of_each_layer():
    encoder, audio = make_encoder(num_hidden_layers=2), make_sweeps()
    states = encoder(audio, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert torch.equal(states[0], encoder.extract_features(audio))
    assert torch.equal(states[2], encoder.context[1](states[1])[0])


@pytest.mark.parametrize("changed", [{}, {"feat_extract_norm": "channel", "context_type": "lstm"}])
def test_it_overfits_a_toy_set(changed):
    torch.manual_seed(0)
    model, audio = CPCForPreTraining(CPCConfig(**{**SMALL, **changed})).train(), make_sweeps(3, 6000)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    for update in range(150):
        output = model(audio, seed=update)
        (output.loss / output.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    output = model.eval()(audio, seed=1000)
    assert output.metrics["contrastive_loss"] / output.num_targets < 0.15 * chance_loss("infonce", 16)
    assert output.metrics["accuracy"] / output.num_targets > 0.85


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"context_type": "rnn"}, "context_type must be one of gru, lstm"),
    ],
)
def test_impossible_values_are_one_line(values, words):
    with pytest.raises(ValueError, match=words) as caught:
        CPCConfig(**values)
    assert "\n" not in str(caught.value)

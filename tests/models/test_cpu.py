"""What replaces dropout, attention with dropout and the positional convolution on a CPU, against what it replaces."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2PositionalConvEmbedding

from acoustic.models import cpu
from acoustic.models.wav2vec2 import Wav2Vec2ForPreTraining


def test_dropout_drops_at_its_rate_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(400, 500, requires_grad=True)
    for p in (0.05, 0.1, 0.5, 0.9):
        y = cpu.Dropout(p)(x)
        assert (y == 0).float().mean() == pytest.approx(p, abs=0.005)
        assert y[y > 0].unique().item() == pytest.approx(1 / (1 - p), rel=1e-3)
        x.grad = None
        (3 * y).sum().backward()
        assert torch.equal(x.grad, 3 * y.detach())


def test_dropped_places_are_independent():
    """Of their neighbours, which come out of the same 64 random bits, and of the places a row further."""
    torch.manual_seed(0)
    dropped = (cpu.draw_kept(torch.Size((1000, 1001)), 0.25)[0] == 0).flatten().float()
    for lag in (1, 2, 3, 4, 1001):
        both = (dropped[lag:] * dropped[:-lag]).mean()
        assert both == pytest.approx(0.0625, abs=0.002), lag


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (7, 1)])
def test_dropout_takes_any_size(shape):
    assert cpu.Dropout(0.5)(torch.ones(shape)).shape == shape


def test_dropout_follows_torchs_seed_and_rests_in_evaluation():
    dropout, x = cpu.Dropout(0.5), torch.randn(50, 50)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(dropout(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert dropout.eval()(x) is x
    assert cpu.Dropout(0.0)(x).equal(x) and not cpu.Dropout(1.0)(x).any()


def test_attention_with_dropout_equals_the_formula():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 2, 7, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    query, key, value = (x.clone().requires_grad_() for x in inputs)
    torch.manual_seed(5)
    output = cpu.DroppedAttention.apply(query, key, value, 0.3, 0.5)
    torch.manual_seed(5)
    kept, scale = cpu.draw_kept(torch.Size((3, 2, 7, 7)), 0.3)
    plain = [x.clone().requires_grad_() for x in inputs]
    expected = ((plain[0] @ plain[1].mT * 0.5).softmax(-1) * kept * scale) @ plain[2]
    torch.testing.assert_close(output, expected)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, other in zip((query, key, value), plain):
        torch.testing.assert_close(mine.grad, other.grad)


def test_each_head_by_itself_is_the_same_to_the_last_bit(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 2, 9, 4, generator=generator) for _ in range(3)]
    results = []
    for limit in (10**9, 0):
        monkeypatch.setattr(cpu, "CACHED_WEIGHTS", limit)
        query, key, value = (x.clone().requires_grad_() for x in inputs)
        torch.manual_seed(5)
        output, _ = cpu.attend(None, query, key, value, None, dropout=0.3)
        output.square().sum().backward()
        results.append((output, query.grad, key.grad, value.grad))
    assert all(map(torch.equal, *results))


def test_attention_without_dropout_or_with_a_mask_is_transformers(monkeypatch):
    query = torch.randn(2, 2, 5, 4)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = False, 1
    monkeypatch.setattr(cpu, "DroppedAttention", None)
    expected = F.scaled_dot_product_attention(query, query, query).transpose(1, 2)
    torch.testing.assert_close(cpu.attend(module, query, query, query, None)[0], expected)
    mask = torch.zeros(2, 1, 5, 5)
    assert cpu.attend(module, query, query, query, mask, dropout=0.5)[0].shape == expected.shape


@pytest.mark.parametrize("frames", [1, 5, 16, 17, 33, 100])
@pytest.mark.parametrize(("kernel", "groups"), [(16, 4), (15, 4), (3, 1), (16, 8)])
def test_the_positional_convolution_equals_transformers(frames, kernel, groups):
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_conv_pos_embeddings=kernel, num_conv_pos_embedding_groups=groups, num_attention_heads=2
    )
    module = Wav2Vec2PositionalConvEmbedding(config)
    gradients = []
    for forward in (module, lambda x: cpu.positional_conv(module, x)):
        hidden = torch.randn(2, frames, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        module.zero_grad()
        output = forward(hidden)
        (output * torch.arange(1.0, 17.0)).sum().backward()
        gradients.append([output, hidden.grad, *[parameter.grad.clone() for parameter in module.parameters()]])
    for theirs, ours in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(theirs.abs().max().item(), 1))


def test_the_positional_convolution_keeps_half_precision():
    module = Wav2Vec2PositionalConvEmbedding(Wav2Vec2Config(hidden_size=32, num_conv_pos_embeddings=16))
    hidden = torch.randn(2, 40, 32)
    with torch.autocast("cpu", torch.bfloat16):
        half = cpu.positional_conv(module, hidden.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), module(hidden), rtol=0.02, atol=0.02)


def test_a_model_gets_them_and_its_checkpoint_does_not_tell(tiny_config, tmp_path):
    model = Wav2Vec2ForPreTraining(Wav2Vec2Config(**tiny_config))
    kinds = {type(module) for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert kinds == {cpu.Dropout}
    assert model.config._attn_implementation == cpu.ATTENTION
    model.save_pretrained(tmp_path)
    assert cpu.ATTENTION not in (tmp_path / "config.json").read_text()
    assert "attn" not in json.loads((tmp_path / "config.json").read_text())
    again = Wav2Vec2ForPreTraining.from_pretrained(tmp_path)
    assert again.config._attn_implementation == cpu.ATTENTION
    eager = Wav2Vec2ForPreTraining.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    audio = torch.randn(2, 8000)
    torch.testing.assert_close(eager.eval()(audio, seed=0).loss, again.eval()(audio, seed=0).loss)


def test_with_dropout_everywhere_training_goes_on_from_a_seed(tiny_config):
    dropouts = {f"{name}_dropout": 0.2 for name in ("hidden", "attention", "activation", "feat_proj")}
    model = Wav2Vec2ForPreTraining(Wav2Vec2Config(**tiny_config, **dropouts)).train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        output = model(torch.ones(2, 8000).cumsum(1).sin(), seed=3)
        output.loss.backward()
        losses.append(output.loss.item())
    assert losses[0] == losses[1] != losses[2]
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)

"""torch.compile of the regions: the same numbers, few graphs. aot_eager needs no compiler."""

import pytest
import torch
from stock import as_transformers
from torch._dynamo.utils import counters
from transformers import Wav2Vec2Config

from acoustic.models.wav2vec2 import Wav2Vec2ForPreTraining


def make_model(tiny_config, **changed):
    torch.manual_seed(0)
    still = {f"{name}_dropout": 0.0 for name in ("hidden", "attention", "activation", "feat_proj", "feat_quantizer")}
    return Wav2Vec2ForPreTraining(Wav2Vec2Config(**{**tiny_config, **still, "mask_time_prob": 0.65, **changed}))


def losses_and_gradient(model, shapes):
    """In evaluation, for Gumbel noise is drawn anew in a graph."""
    losses = []
    for index, shape in enumerate(shapes):
        audio = torch.randn(shape, generator=torch.Generator().manual_seed(index))
        output = model.eval()(audio, seed=index)
        output.loss.backward()
        losses.append(output.loss.item())
    # An argmax passes no gradient: a graph says 0 where eager has none.
    return losses, [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


SHAPES = [(3, 16000), (2, 20000), (4, 12000), (6, 9000), (3, 16000), (5, 7000)]


@pytest.mark.parametrize("stable", [False, True])
def test_compiled_equals_eager_on_few_graphs(tiny_config, stable):
    norm = {"do_stable_layer_norm": stable, "feat_extract_norm": "layer" if stable else "group"}
    expected = losses_and_gradient(make_model(tiny_config, **norm), SHAPES)
    torch._dynamo.reset()
    counters.clear()
    model = make_model(tiny_config, **norm)
    model.compile_regions(backend="aot_eager")
    losses, gradients = losses_and_gradient(model, SHAPES)
    assert losses == pytest.approx(expected[0], rel=1e-5)
    for mine, other in zip(gradients, expected[1]):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3 * other.abs().max().item() + 1e-6)
    # One for all layers and one for the loss, with fixed and then with free sizes.
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


def test_annealing_does_not_recompile(tiny_config):
    torch._dynamo.reset()
    model = make_model(tiny_config, layerdrop=0.5).train()
    model.compile_regions(backend="aot_eager")
    audio = torch.randn(3, 16000)
    model.set_gumbel_temperature(2.0)
    model(audio, seed=0, kept_layers=(True, True))
    counters.clear()
    for update in range(5):
        model.set_gumbel_temperature(2.0 - 0.3 * update)
        model(audio, seed=update, kept_layers=(update % 2 == 0, True)).loss.backward()
    assert counters["stats"]["unique_graphs"] == 0


def test_compiled_it_takes_given_masks_too(tiny_config):
    model = make_model(tiny_config).eval()
    audio = torch.randn(3, 16000)
    targets = as_transformers(model.draw_targets(3, 16000, 1))
    expected = model(audio, **targets).loss
    model.compile_regions(backend="aot_eager")
    torch.testing.assert_close(model(audio, **targets).loss, expected, rtol=1e-5, atol=1e-5)

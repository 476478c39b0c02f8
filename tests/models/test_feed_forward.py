"""The feed-forward layers against transformers', and what they keep for the backward pass."""

import copy

import pytest
import torch
from transformers import Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeedForward

from acoustic.models.feed_forward import FeedForward


def make_both(**changed):
    torch.manual_seed(0)
    config = {"hidden_size": 12, "intermediate_size": 40, "hidden_dropout": 0.0, "activation_dropout": 0.0, **changed}
    theirs = Wav2Vec2FeedForward(Wav2Vec2Config(num_attention_heads=2, **config))
    ours = copy.deepcopy(theirs)
    ours.__class__ = FeedForward
    return ours.train(), theirs.train()


@pytest.mark.parametrize("changed", [{}, {"hidden_act": "relu"}])
def test_equals_transformers(changed):
    ours, theirs = make_both(**changed)
    gradients = []
    for module in (ours, theirs):
        x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
        output = module(x)
        output.square().sum().backward()
        gradients.append([output, x.grad, *[parameter.grad for parameter in module.parameters()]])
    for mine, other in zip(*gradients):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_dropout_of_the_activations_stays():
    ours, _ = make_both(activation_dropout=0.5)
    x = torch.randn(2, 7, 12)
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_it_keeps_half_as_much():
    sizes = []
    for module in make_both():
        kept = {}

        def keep(x, kept=kept):
            kept[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            module(torch.randn(50, 20, 12))
        sizes.append(sum(size for size in kept.values() if size == 50 * 20 * 40))
    assert sizes == [50 * 20 * 40, 2 * 50 * 20 * 40]


def test_half_precision():
    ours, theirs = make_both()
    x = torch.randn(2, 7, 12)
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = ours(x), theirs(x)
    assert mine.dtype == other.dtype == torch.bfloat16
    torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)

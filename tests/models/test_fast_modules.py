"""Every head on wav2vec 2.0 with our modules, against transformers' own."""

import pytest
import torch
import transformers

from acoustic.models.build import load_weights
from acoustic.models.fast_modules import FASTER, use_fast_modules

HEADS = ("AutoModelForAudioClassification", "AutoModelForAudioFrameClassification", "AutoModelForCTC", "AutoModel")
SETTINGS = {"num_labels": 4, "vocab_size": 9, "layerdrop": 0.0, "mask_time_prob": 0.0, "attn_implementation": "sdpa"}
SETTINGS |= {f"{name}_dropout": 0.0 for name in ("hidden", "attention", "activation", "final", "feat_proj")}


@pytest.fixture(params=["group_norm_checkpoint", "layer_norm_checkpoint"])
def checkpoint(request) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=HEADS)
def pair(request, checkpoint):
    """(transformers' model, the same loaded by us)."""
    torch.manual_seed(0)
    auto_class = getattr(transformers, request.param)
    stock = auto_class.from_pretrained(checkpoint, **SETTINGS)
    ours, _ = load_weights(auto_class, checkpoint, None, stock.config)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def batch():
    """Two windows of which one is padded, as where the feature extractor gives masks."""
    mask = torch.ones(2, 12_000, dtype=torch.long)
    mask[1, 9_000:] = 0
    audio = torch.randn(2, 12_000, generator=torch.Generator().manual_seed(1)) * mask
    return {"input_values": audio, "attention_mask": mask}


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))


def output_of(model, **inputs) -> torch.Tensor:
    return model(**inputs)[0]


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients(pair, training):
    results = []
    for model in pair:
        model.train(training)
        output = output_of(model, **batch())
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        results.append((output.detach(), grads))
    (expected, stock_grads), (found, grads) = results
    assert_near(found, expected)
    assert grads.keys() == stock_grads.keys()
    for name, grad in stock_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max() + 1e-3), msg=name)


def test_modules_are_replaced_and_weights_keep_their_names(pair, tmp_path):
    stock, ours = pair
    assert not any(type(module) in FASTER for module in ours.modules())
    assert any(type(module) in FASTER for module in stock.modules())
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.save_pretrained(tmp_path)
    again = type(stock).from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    with torch.no_grad():
        expected = output_of(again, **batch())
        assert_near(output_of(ours.eval(), **batch()), expected)


def test_checkpointing_and_frozen_convs(checkpoint):
    torch.manual_seed(0)
    ours = transformers.AutoModelForCTC.from_pretrained(checkpoint, **SETTINGS)
    use_fast_modules(ours)
    ours.train()
    grads = []
    for checkpointing in (False, True):
        (ours.gradient_checkpointing_enable if checkpointing else ours.gradient_checkpointing_disable)()
        ours.zero_grad()
        ours(**batch()).logits.square().sum().backward()
        grads.append([value.grad.clone() for value in ours.parameters() if value.grad is not None])
    for plain, again in zip(*grads):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)
    ours.gradient_checkpointing_disable()
    ours.freeze_feature_encoder()
    ours.zero_grad()
    ours(**batch()).logits.square().sum().backward()
    frozen = ours.wav2vec2.feature_extractor.parameters()
    assert all(value.grad is None for value in frozen)


def test_other_models_stay_as_they_are():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1))
    use_fast_modules(model)
    assert type(model[1]) is torch.nn.Dropout

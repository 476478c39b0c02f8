"""Mockingjay's encoder against transformers' `BertModel`, and its size against the published."""

import pytest
import torch
import transformers

from acoustic.models.mockingjay import LARGE, MockingjayConfig, MockingjayForPreTraining, MockingjayModel
from acoustic.models.reconstruction import sinusoids

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 3}


@pytest.mark.parametrize(("values", "published"), [({}, 21_450_240), (LARGE, 85_118_208)])
def test_sizes_are_those_published(values, published):
    """S3PRL's encoder: BERT's layers, the linear map of the input and its LayerNorm; no pooler, no embeddings."""
    with torch.device("meta"):
        encoder = MockingjayModel(MockingjayConfig(**values))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == published


@pytest.mark.parametrize(("values", "sizes"), [({}, (240, 240, 3)), (LARGE, (80, 201, 12))])
def test_base_and_large(values, sizes):
    config = MockingjayConfig(**values)
    assert (config.feature_size, config.target_size, config.num_hidden_layers) == sizes
    with torch.device("meta"):
        head = MockingjayForPreTraining(config).head
    # S3PRL's head: dense 768 -> 768, LayerNorm, linear to a frame.
    expected = 768 * 768 + 768 + 2 * 768 + 768 * sizes[1] + sizes[1]
    assert sum(parameter.numel() for parameter in head.parameters()) == expected
    assert config.inputs_to_logits_ratio == 160


@pytest.mark.parametrize("padded", [False, True])
def test_the_encoder_is_berts(padded):
    """`BertModel` on `inputs_embeds`, with its own embeddings of positions and types at 0."""
    torch.manual_seed(0)
    ours = MockingjayModel(MockingjayConfig(**SMALL)).eval()
    bert = transformers.BertModel(transformers.BertConfig(**SMALL), add_pooling_layer=False).eval()
    bert.encoder.load_state_dict(ours.encoder.state_dict())
    bert.embeddings.LayerNorm.load_state_dict(ours.input_layer.layer_norm.state_dict())
    for table in (bert.embeddings.position_embeddings, bert.embeddings.token_type_embeddings):
        torch.nn.init.zeros_(table.weight)
    features = torch.randn(2, 40, 240)
    mask = torch.arange(40) < torch.tensor([[40], [25]]) if padded else None
    with torch.no_grad():
        inputs_embeds = ours.input_layer.projection(features) + sinusoids(40, 32, "cpu")
        expected = bert(inputs_embeds=inputs_embeds, attention_mask=mask, output_hidden_states=True)
        outputs = ours.contextualize(features, mask, output_hidden_states=True)
    real = slice(None) if mask is None else mask
    for state, other in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state[real], other[real], rtol=1e-4, atol=1e-5)

"""Audio ALBERT's encoder against transformers' `AlbertModel`, and its size, which depth does not change."""

import pytest
import torch
import transformers

from acoustic.models.audio_albert import AudioAlbertConfig, AudioAlbertModel
from acoustic.models.reconstruction import sinusoids

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 3}


@pytest.mark.parametrize("layers", [3, 6, 12])
def test_parameters_do_not_grow_with_depth(layers):
    """One of BERT's layers (7,087,872), the linear map of the input (62,208) and its LayerNorm (1,536): 7.15 M."""
    with torch.device("meta"):
        encoder = AudioAlbertModel(AudioAlbertConfig(num_hidden_layers=layers))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 7_087_872 + 62_208 + 1536
    assert len(encoder.layers) == layers


def test_depth_changes_what_comes_out():
    torch.manual_seed(0)
    features, outputs = torch.randn(1, 20, 80), []
    shallow = AudioAlbertModel(AudioAlbertConfig(**SMALL)).eval()
    deep = AudioAlbertModel(AudioAlbertConfig(**{**SMALL, "num_hidden_layers": 6})).eval()
    deep.load_state_dict(shallow.state_dict())
    outputs = deep.contextualize(features, output_hidden_states=True).hidden_states
    assert len(outputs) == 7
    torch.testing.assert_close(shallow.contextualize(features).last_hidden_state, outputs[3])
    assert (outputs[6] - outputs[3]).abs().max() > 0.1


@pytest.mark.parametrize("padded", [False, True])
def test_the_encoder_is_alberts(padded):
    """`AlbertModel` on `inputs_embeds`, with its embeddings of positions and types at 0 and no change of width."""
    torch.manual_seed(0)
    ours = AudioAlbertModel(AudioAlbertConfig(**SMALL)).eval()
    config = transformers.AlbertConfig(**SMALL, embedding_size=32, hidden_act="gelu")
    albert = transformers.AlbertModel(config, add_pooling_layer=False).eval()
    albert.encoder.albert_layer_groups[0].albert_layers[0].load_state_dict(ours.layer.state_dict())
    albert.embeddings.LayerNorm.load_state_dict(ours.input_layer.layer_norm.state_dict())
    torch.nn.init.eye_(albert.encoder.embedding_hidden_mapping_in.weight)
    for table in (albert.embeddings.position_embeddings, albert.embeddings.token_type_embeddings):
        torch.nn.init.zeros_(table.weight)
    features = torch.randn(2, 40, 80)
    mask = torch.arange(40) < torch.tensor([[40], [25]]) if padded else None
    with torch.no_grad():
        inputs_embeds = ours.input_layer.projection(features) + sinusoids(40, 32, "cpu")
        expected = albert(inputs_embeds=inputs_embeds, attention_mask=mask).last_hidden_state
        hidden = ours.contextualize(features, mask).last_hidden_state
    real = slice(None) if mask is None else mask
    torch.testing.assert_close(hidden[real], expected[real], rtol=1e-4, atol=1e-5)

"""Models from scratch and continued from every kind of checkpoint; what is saved loads in plain transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModel, Wav2Vec2ForCTC

from acoustic.console import UserError
from acoustic.models import OBJECTIVES, build_for_pretraining, load_config
from acoustic.models.wav2vec2 import Wav2Vec2ForPreTraining

KINDS = ["group_norm_checkpoint", "layer_norm_checkpoint", "ctc_checkpoint"]


def build(checkpoint=None, **overrides):
    return build_for_pretraining("wav2vec2", checkpoint, None, overrides)


def with_config(checkpoint: str, folder: Path, **changes) -> str:
    """A copy of a checkpoint with other values in its config.json."""
    shutil.copytree(checkpoint, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_continuing_keeps_the_encoder(kind, request):
    checkpoint = request.getfixturevalue(kind)
    model, _, notes = build(checkpoint)
    original = AutoModel.from_pretrained(checkpoint).state_dict()
    for name, value in model.wav2vec2.state_dict().items():
        assert torch.equal(value, original[name]), name
    assert checkpoint in notes[0]


@pytest.mark.parametrize("kind", KINDS[:2])
def test_continuing_keeps_the_pretraining_head(kind, request):
    checkpoint = request.getfixturevalue(kind)
    model, _, notes = build(checkpoint)
    original = transformers.Wav2Vec2ForPreTraining.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    assert len(notes) == 1


def test_a_ctc_checkpoint_gets_a_fresh_head_and_says_so(ctc_checkpoint):
    transformers.set_seed(0)
    model, _, notes = build(ctc_checkpoint)
    assert "start afresh" in notes[1]
    assert all(name in notes[1] for name in ("quantizer", "project_hid", "project_q"))
    transformers.set_seed(1)
    fresh = Wav2Vec2ForPreTraining(model.config).state_dict()
    for name, value in model.state_dict().items():
        if not name.startswith("wav2vec2."):
            # As transformers initialises them: not zeros, not what was in memory.
            assert value.isfinite().all(), name
            assert value.std().item() == pytest.approx(fresh[name].std().item(), rel=0.5, abs=1e-6), name


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_what_is_saved_loads_in_plain_transformers(kind, request, tmp_path, tiny_config):
    model, feature_extractor, _ = build(request.getfixturevalue(kind)) if kind else build(**tiny_config)
    model.save_pretrained(tmp_path)
    feature_extractor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Wav2Vec2ForPreTraining"]

    pretraining, info = transformers.Wav2Vec2ForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(pretraining) is transformers.Wav2Vec2ForPreTraining
    encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    ctc, info = Wav2Vec2ForCTC.from_pretrained(tmp_path, vocab_size=7, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"lm_head"}

    audio = torch.randn(1, 8000)
    with torch.no_grad():
        expected = model.eval().wav2vec2(audio).last_hidden_state
        for loaded in (pretraining.wav2vec2, encoder, ctc.wav2vec2):
            torch.testing.assert_close(loaded.eval()(audio).last_hidden_state, expected)


def test_fine_tuning_settings_do_not_leak_into_pretraining(ctc_checkpoint, tmp_path):
    checkpoint = with_config(ctc_checkpoint, tmp_path / "tuned", apply_spec_augment=False, mask_feature_prob=0.5)
    model, _, _ = build(checkpoint)
    assert model.config.apply_spec_augment is True
    assert model.config.mask_feature_prob == 0.0
    # With apply_spec_augment off the masked frames would be visible, and the task trivial.
    audio = torch.randn(1, 8000)
    mask = torch.zeros(1, 24, dtype=torch.bool)
    mask[0, 5:15] = True
    with torch.no_grad():
        model.eval()
        assert not torch.allclose(model.wav2vec2(audio)[0], model.wav2vec2(audio, mask_time_indices=mask)[0])


SETTINGS = {
    "mask_time_prob": 0.5,
    "negatives_from": "batch",
    "feature_grad_mult": None,
    "feature_penalty_weight": None,
}


@pytest.mark.parametrize(
    ("kind", "mult", "penalty"), [("group_norm_checkpoint", 0.1, 10.0), ("layer_norm_checkpoint", 1.0, 0.0)]
)
def test_settings_go_into_the_config_and_default_to_the_papers(kind, mult, penalty, request):
    model, _, notes = build_for_pretraining("wav2vec2", request.getfixturevalue(kind), None, {}, SETTINGS)
    config = model.config
    assert (config.mask_time_prob, config.negatives_from) == (0.5, "batch")
    assert (config.feature_grad_mult, config.feature_penalty_weight) == (mult, penalty)
    assert any(f"feature_grad_mult {mult:g}, feature_penalty_weight {penalty:g}" in note for note in notes)


def test_a_checkpoint_of_ours_goes_on_with_its_own_settings(group_norm_checkpoint, tmp_path):
    checkpoint = with_config(group_norm_checkpoint, tmp_path / "ours", feature_grad_mult=0.5)
    config = build_for_pretraining("wav2vec2", checkpoint, None, {}, SETTINGS)[0].config
    assert (config.feature_grad_mult, config.feature_penalty_weight) == (0.5, 10.0)
    config = build_for_pretraining("wav2vec2", checkpoint, None, {}, {**SETTINGS, "feature_grad_mult": 0.7})[0].config
    assert config.feature_grad_mult == 0.7


def test_a_setting_is_no_override():
    with pytest.raises(UserError, match="mask_time_prob is an option of its own: --mask_time_prob"):
        build_for_pretraining("wav2vec2", None, None, {"mask_time_prob": 0.3}, SETTINGS)


def test_without_gradient_the_convs_are_frozen(tiny_config):
    model = build_for_pretraining("wav2vec2", None, None, tiny_config, {**SETTINGS, "feature_grad_mult": 0.0})[0]
    model(torch.randn(2, 8000)).loss.backward()
    trained = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "feature_extractor" not in trained and "encoder" in trained
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_checkpoint_that_was_tuned_without_masks_is_pretrained_with_them(ctc_checkpoint, tmp_path):
    checkpoint = with_config(ctc_checkpoint, tmp_path / "tuned", mask_time_prob=0.0)
    model = build_for_pretraining("wav2vec2", checkpoint, None, {}, SETTINGS)[0]
    assert model.config.mask_time_prob == 0.5
    assert model(torch.randn(2, 8000), seed=0).loss.isfinite()


def test_overrides_win_over_the_checkpoint(group_norm_checkpoint):
    model, _, _ = build(group_norm_checkpoint, num_negatives=7, layerdrop=0.25)
    assert (model.config.num_negatives, model.config.layerdrop) == (7, 0.25)
    assert model.config.hidden_size == 32


def test_the_feature_extractor_is_the_checkpoints(layer_norm_checkpoint, group_norm_checkpoint):
    assert build(layer_norm_checkpoint)[1].return_attention_mask is True
    assert build(group_norm_checkpoint)[1].return_attention_mask is False


def test_weights_that_are_missing_beside_the_head_are_named(group_norm_checkpoint, tmp_path):
    model = transformers.Wav2Vec2ForPreTraining.from_pretrained(group_norm_checkpoint)
    state = {name: value for name, value in model.state_dict().items() if "layers.1.final" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    shutil.copy(Path(group_norm_checkpoint, "preprocessor_config.json"), tmp_path)
    notes = build(str(tmp_path))[2]
    assert any("not in the checkpoint, so random" in note and "layers.1.final_layer_norm" in note for note in notes)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"hiden_size": 64}, ["hiden_size", "hidden_size"]),
        ({"hidden_size": 30, "num_attention_heads": 4}, ["num_attention_heads"]),
        ({"conv_dim": [8, 8]}, ["conv_dim"]),
        ({"hidden_size": "wide"}, ["hidden_size"]),
    ],
)
def test_impossible_overrides_are_one_line(overrides, words):
    with pytest.raises(UserError) as error:
        build(**overrides)
    assert str(error.value).startswith("config_overrides: ")
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_not_there():
    with pytest.raises(UserError, match="model_name_or_path: no model '/no/such/model'"):
        build("/no/such/model")


def test_a_checkpoint_of_another_family(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a bert checkpoint"):
        build(str(tmp_path))


def test_a_checkpoint_without_a_feature_extractor(group_norm_checkpoint, tmp_path):
    shutil.copytree(group_norm_checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("preprocessor*"))
    with pytest.raises(UserError, match="preprocessor_config.json"):
        build(str(tmp_path / "bare"))


@pytest.mark.parametrize(
    "objective, overrides, words",
    [
        ("cpc", {"log_compression": "no"}, "'log_compression' expected bool, got str"),
        ("wav2vec", {"conv_dim": 64}, "'conv_dim' with value 64"),
        ("vq_wav2vec", {"share_codevectors": 3}, "'share_codevectors' expected bool, got int"),
        ("mockingjay", {"hidden_dropout_prob": "much"}, "'hidden_dropout_prob' with value 'much'"),
        ("audio_albert", {"layer_norm_eps": "x"}, "'layer_norm_eps' with value 'x'"),
    ],
)
def test_values_of_another_type_are_one_line(objective, overrides, words):
    with pytest.raises(UserError, match=f"^config_overrides: .*{words}") as error:
        build_for_pretraining(objective, None, None, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("objective", ["mockingjay", "wav2vec2"])
def test_masks_stay_those_of_a_checkpoint_of_ours(objective, tiny_config, tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    overrides = tiny_config if objective == "wav2vec2" else small
    chosen = dict.fromkeys(OBJECTIVES[objective].config_options)
    chosen |= {"mask_time_prob": 0.3, "mask_time_length": 12, "negatives_from": "masked"}
    model, extractor, _ = build_for_pretraining(objective, None, None, overrides, chosen)
    model.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    again, _, _ = build_for_pretraining(objective, str(tmp_path), None, {}, dict.fromkeys(chosen))
    assert (again.config.mask_time_prob, again.config.mask_time_length) == (0.3, 12)
    other, _, _ = build_for_pretraining(objective, str(tmp_path), None, {}, {"mask_time_prob": 0.2})
    assert (other.config.mask_time_prob, other.config.mask_time_length) == (0.2, 12)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"mask_time_length": 0}, "mask_time_length 0: at least 1"),
        ({"mask_feature_prob": 5.0}, "mask_feature_prob 5.0: a share from 0 to 1"),
    ],
)
def test_values_of_the_heads_out_of_range_are_one_line(overrides, words, tmp_path):
    OBJECTIVES["wav2vec"].config_class().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^config_overrides: .*{words}"):
        load_config(str(tmp_path), overrides=overrides)


UNUSED = [("cpc", "mask_time_prob"), ("wav2vec", "classifier_proj_size"), ("mockingjay", "vocab_size")]


@pytest.mark.parametrize("objective, name", UNUSED)
def test_what_only_the_heads_read_is_no_setting_of_pretraining(objective, name):
    with pytest.raises(UserError, match=f"config_overrides: {name} is for fine-tuning"):
        build_for_pretraining(objective, None, None, {name: 1})


def test_code_bert_takes_no_other_quantizer_by_overrides():
    with pytest.raises(UserError, match="quantizer is that of --quantizer_name_or_path"):
        build_for_pretraining("code_bert", None, None, {"quantizer": {}}, quantizer="nowhere")


def test_a_checkpoint_keeps_its_sizes(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model, feature_extractor, _ = build_for_pretraining("mockingjay", None, None, sizes)
    for part in (model, feature_extractor):
        part.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="other sizes than config_overrides give .* leave them out"):
        build_for_pretraining("mockingjay", str(tmp_path), None, {"num_mel_bands": 40})


def test_masks_that_stay_a_checkpoints_are_said(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model, feature_extractor, _ = build_for_pretraining(
        "mockingjay", None, None, sizes, {"mask_time_prob": 0.4, "mask_time_length": 5}
    )
    for part in (model, feature_extractor):
        part.save_pretrained(tmp_path)
    settings = {"mask_time_prob": None, "mask_time_length": 3}
    model, _, notes = build_for_pretraining("mockingjay", str(tmp_path), None, {}, settings)
    assert (model.config.mask_time_prob, model.config.mask_time_length) == (0.4, 3)
    assert f"mask_time_prob 0.4: as {tmp_path} was trained" in notes

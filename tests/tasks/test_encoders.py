"""Fine-tuning on encoders other than wav2vec 2.0: their frames, probes, weighted layers, controls, pipelines."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from toy_encoder import ToyConfig, ToyModel

import run_finetune
from acoustic.config import parse_finetuning
from acoustic.console import UserError
from acoustic.report.record import read_json
from acoustic.tasks.base import mask_length, masking_overrides
from acoustic.tasks.classification import Classification
from acoustic.tasks.ctc import CTC

WORDS = {"low": [300], "high": [2400], "up": [300, 2400], "down": [2400, 300]}


@pytest.fixture(scope="session")
def toy_checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    model = ToyModel(ToyConfig())
    torch.nn.init.constant_(model.front["scale"].weight, 2.0)
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def build(rows_of):
    """build(task, checkpoint, random_weights=False, weighted=False, **options) -> model, feature extractor, notes."""

    def make(kind: str, checkpoint: str, random_weights=False, weighted=False, **options):
        task = (
            Classification(rows_of("label", ["a", "b"]), None)
            if kind == "classification"
            else CTC(rows_of("text", ["ab", "ba"]), None)
        )
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        given = ["--model_name_or_path", checkpoint, "--dataset_name", "x", "--output_dir", "x", *words]
        return task.build(parse_finetuning(given)[0], random_weights, 600.0, weighted)

    return make


@pytest.mark.parametrize(
    ("config", "frames", "channels"),
    [
        (transformers.Wav2Vec2Config(), 10, 64),
        (ToyConfig(hidden_size=768, feature_size=80), 20, 6),
        (transformers.Wav2Vec2Config(hidden_size=36, conv_stride=[10, 2, 2, 2, 2, 2, 2]), 5, 3),
        (ToyConfig(sampling_rate=8000, feature_size=4), 10, 1),
    ],
)
def test_spans_are_a_fifth_of_a_second_and_a_twelfth_of_the_channels(config, frames, channels):
    overrides = masking_overrides(config, 0.65, 0.25)
    assert (overrides["mask_time_length"], overrides["mask_feature_length"]) == (frames, channels)
    assert (overrides["mask_time_prob"], overrides["mask_feature_prob"]) == (0.65, 0.25)


def test_short_clips_are_only_skipped_for_transformers_masks():
    settings = {"mask_time_prob": 0.5, "mask_time_length": 7}
    assert mask_length(transformers.Wav2Vec2Config(**settings)) == 7
    assert mask_length(ToyConfig(**settings)) == 0


def test_the_settings_of_an_encoder_without_layerdrop(build, toy_checkpoint):
    model, _, notes = build("ctc", toy_checkpoint)
    assert not hasattr(model.config, "layerdrop")
    assert (model.config.mask_time_prob, model.config.mask_time_length) == (0.65, 20)
    assert (model.config.mask_feature_prob, model.config.mask_feature_length) == (0.25, 2)
    assert (model.config.ctc_loss_reduction, model.config.ctc_zero_infinity) == ("sum", True)
    assert notes[0] == f"model: encoder from {toy_checkpoint}"
    assert notes[1] == "new head with random weights: lm_head"
    assert notes[-1].endswith("mask_time_prob 0.65, mask_feature_prob 0.25")


def test_settings_that_the_encoder_lacks(build, toy_checkpoint):
    with pytest.raises(UserError, match="config_overrides: ToyConfig has no 'layerdrop'"):
        build("ctc", toy_checkpoint, config_overrides='{"layerdrop": 0.3}')


def test_a_rate_that_the_front_end_is_not_made_for(build, tmp_path):
    ToyModel(ToyConfig(sampling_rate=8000)).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="features at 8000 Hz, and its preprocessor_config.json says 16000 Hz"):
        build("ctc", str(tmp_path))


@pytest.mark.parametrize("kind", ["classification", "ctc"])
def test_weighted_layers_are_asked_for_by_an_option(build, toy_checkpoint, kind):
    model, _, notes = build(kind, toy_checkpoint, weighted=True)
    assert model.layer_weights.tolist() == [0, 0, 0]
    assert "learned weighted sum over 3 layers" in notes
    model, _, notes = build(kind, toy_checkpoint)
    assert not hasattr(model, "layer_weights")
    assert not any("weighted" in note for note in notes)


def test_weighted_layers_of_wav2vec2(build, group_norm_checkpoint):
    """transformers' own for classification, equal at first; it has none for CTC."""
    model, _, notes = build("classification", group_norm_checkpoint, weighted=True)
    assert type(model) is transformers.Wav2Vec2ForSequenceClassification
    assert len(set(model.layer_weights.tolist())) == 1
    assert "learned weighted sum over 3 layers" in notes
    assert model.config.layerdrop == 0  # a dropped layer leaves no output to weigh
    with pytest.raises(UserError, match="weighted_layer_sum: transformers' Wav2Vec2ForCTC has none"):
        build("ctc", group_norm_checkpoint, weighted=True)


def test_weighted_layers_need_all_of_them(build, group_norm_checkpoint):
    with pytest.raises(UserError, match="weighted_layer_sum: needs all layers; leave layerdrop out"):
        build("classification", group_norm_checkpoint, weighted=True, config_overrides='{"layerdrop": 0.1}')


def test_random_weights_keep_what_is_never_trained(build, toy_checkpoint):
    trained = ToyModel.from_pretrained(toy_checkpoint)
    torch.manual_seed(1)
    model, _, notes = build("classification", toy_checkpoint, random_weights=True)
    assert notes[1] == f"never trained, so kept from {toy_checkpoint}: front.scale"
    for name, value in trained.state_dict().items():
        assert torch.equal(value, model.toy.state_dict()[name]) == name.startswith("front.scale"), name


@pytest.fixture
def words(sound, labeled_folder):
    clips = {
        f"{word}/{index}.wav": sound(pitches, 0.6, index) for word, pitches in WORDS.items() for index in range(2)
    }
    return labeled_folder(clips, {name: {"said": name.split("/")[0], "kind": name.split("/")[0]} for name in clips})


TASKS = {
    "classification": ({"label_column_name": "kind"}, "audio-classification"),
    "ctc": ({"text_column_name": "said"}, "automatic-speech-recognition"),
}
STILL = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "final_dropout": 0.0}


@pytest.fixture
def finetune(words, finetune_args, tmp_path):
    """finetune(task, checkpoint, **options) -> results; the folder is tmp_path / "out"."""

    def run(task: str, checkpoint: str, **options):
        columns, _ = TASKS[task]
        settings = {"train_split_name": "train", "test_split_name": "train", "batch_seconds": 5, **columns, **options}
        return run_finetune.main(finetune_args(task, words, model_name_or_path=checkpoint, **settings))

    return run


@pytest.mark.parametrize("task", TASKS)
def test_a_probe_leaves_the_encoder_alone(finetune, toy_checkpoint, task, tmp_path):
    """Frozen for good, with the weights of the layers learned beside the head."""
    finetune(task, toy_checkpoint, max_steps=3, freeze_encoder_steps=3, weighted_layer_sum=True, learning_rate=1e-2)
    auto = {"classification": transformers.AutoModelForAudioClassification, "ctc": transformers.AutoModelForCTC}[task]
    model, encoder = auto.from_pretrained(tmp_path / "out"), ToyModel.from_pretrained(toy_checkpoint)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, model.toy.state_dict()[name]), name
    assert len(set(model.layer_weights.tolist())) > 1


@pytest.mark.parametrize("task", TASKS)
def test_what_is_fine_tuned_runs_in_a_pipeline(finetune, toy_checkpoint, task, sound, tmp_path):
    """transformers' pipeline hears what our evaluation heard."""
    finetune(
        task,
        toy_checkpoint,
        max_steps=150 if task == "ctc" else 50,
        freeze_encoder_steps=0,
        freeze_feature_encoder=False,
        learning_rate=1e-2,
        config_overrides=STILL,
        eval_strategy="no",
    )
    pipe = transformers.pipeline(TASKS[task][1], model=str(tmp_path / "out"), device="cpu")
    predictions = read_json(tmp_path / "out" / "predictions_train.json")["predictions"]
    assert len(predictions) == 8
    for item in predictions:
        word, index = item["name"].removesuffix(".wav").split("/")
        heard = pipe(np.asarray(sound(WORDS[word], 0.6, int(index))))
        heard = heard[0]["label"] if task == "classification" else heard["text"]
        assert heard == item["prediction"] != ""
        assert task == "ctc" or heard == word


@pytest.mark.parametrize("task", TASKS)
def test_a_resumed_run_hides_the_same_spans(finetune, toy_checkpoint, task, tmp_path):
    """SpecAugment and dropout go on where they were: the weights are those of a run that never stopped."""
    options = {"max_steps": 4, "eval_strategy": "no", "freeze_encoder_steps": 1, "learning_rate": 1e-2}
    finetune(task, toy_checkpoint, save_steps=2, save_strategy="steps", **options)
    whole = load_file(tmp_path / "out" / "model.safetensors")
    stopped = tmp_path / "out" / "checkpoint-2"
    finetune(task, toy_checkpoint, output_dir=tmp_path / "on", resume_from_checkpoint=stopped, **options)
    resumed = load_file(tmp_path / "on" / "model.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())

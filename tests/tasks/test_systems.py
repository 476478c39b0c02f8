"""Every pretrained encoder under every head: from its checkpoint, padded, frozen, random, by heart, in a pipeline."""

import numpy as np
import pytest
import torch
import transformers

import run_finetune
from acoustic.config import parse_finetuning
from acoustic.models import OBJECTIVES, build_for_pretraining
from acoustic.report.record import read_json
from acoustic.tasks.classification import Classification
from acoustic.tasks.ctc import CTC

TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL = {
    "wav2vec": {"hidden_size": 32, "conv_dim": [32] * 7, "context_kernel": [2, 3, 4]},
    "vq_wav2vec": {"hidden_size": 32, "conv_dim": [32] * 8, "context_kernel": [2, 3, 4]},
    "cpc": {"hidden_size": 32, "conv_dim": [32] * 5, "feat_extract_norm": "channel"},
    "mockingjay": {**TRANSFORMER, "num_mel_bands": 40},
    "audio_albert": {**TRANSFORMER, "num_mel_bands": 40},
    "code_bert": TRANSFORMER,
}
SYSTEMS = [name for name in OBJECTIVES if name != "wav2vec2"]  # which transformers' heads are for, see the other tests
AUTO = {
    "classification": transformers.AutoModelForAudioClassification,
    "ctc": transformers.AutoModelForCTC,
    "frames": transformers.AutoModelForAudioFrameClassification,
}
LENGTHS = (12_000, 8_000, 5_000)  # samples
LABELS = {"classification": torch.tensor([0, 1, 1]), "ctc": torch.tensor([[3, 4], [4, 3], [4, -100]])}


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """pretrained(name) -> the folder of a toy checkpoint, as pretraining leaves it."""
    folders = {}

    def make(name: str) -> str:
        if name not in folders:
            torch.manual_seed(0)
            quantizer = make("vq_wav2vec") if name == "code_bert" else None
            model, feature_extractor, _ = build_for_pretraining(name, None, None, SMALL[name], quantizer=quantizer)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            feature_extractor.save_pretrained(folder)
            folders[name] = str(folder)
        return folders[name]

    return make


@pytest.fixture(params=SYSTEMS)
def system(request) -> str:
    return request.param


@pytest.fixture
def build(system, pretrained, rows_of):
    """build(kind, random_weights=False, weighted=False, **config) -> model, feature extractor, notes."""

    def make(kind: str, random_weights=False, weighted=False, **options):
        given = ["--model_name_or_path", pretrained(system), "--dataset_name", "x", "--output_dir", "x"]
        model_args = parse_finetuning(given)[0]
        model_args.config_overrides = options
        if kind == "classification":
            task = Classification(rows_of("label", ["a", "b"]), None)
        else:
            task = CTC(rows_of("text", ["ab", "ba"]), None)
        return task.build(model_args, random_weights, 600.0, weighted)

    return make


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal(length).astype(np.float32) * 0.1 for length in LENGTHS]


def pad(feature_extractor, clips) -> dict:
    return dict(feature_extractor(clips, sampling_rate=16_000, padding=True, return_tensors="pt"))


def is_frozen(model, name: str) -> bool:
    """In a part that no training changes."""
    prefix = model.base_model_prefix + "."
    return any(name.startswith(f"{prefix}{part}.") for part in getattr(model.base_model, "frozen_parts", ()))


@pytest.mark.parametrize("kind", LABELS)
def test_the_encoder_is_the_checkpoints(build, kind, system, pretrained):
    model, _, notes = build(kind)
    encoder = transformers.AutoModel.from_pretrained(pretrained(system)).state_dict()
    for name, value in model.base_model.state_dict().items():
        assert torch.equal(value, encoder[name]), name
    assert notes[1].startswith("new head with random weights: ")
    assert model.config.inputs_to_logits_ratio * model.config.mask_time_length == 0.2 * 16_000


@pytest.mark.parametrize("kind", LABELS)
def test_the_control_is_random_all_over(build, kind, system, pretrained):
    torch.manual_seed(1)
    model, _, _ = build(kind, random_weights=True)
    encoder = transformers.AutoModel.from_pretrained(pretrained(system))
    weights = dict(encoder.named_parameters())
    same = {name for name, value in model.base_model.named_parameters() if torch.equal(value, weights[name])}
    parts = tuple(f"{part}." for part in getattr(encoder, "frozen_parts", ()))
    kept = {name for name in same if name.startswith(parts)} if parts else set()
    assert kept == {name for name in weights if parts and name.startswith(parts)}
    # Biases and norms start alike.
    assert all(weights[name].dim() == 1 for name in same - kept), same - kept


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_clip_gives_the_same_alone_and_beside_longer_ones(build, kind, weighted, clips):
    model, feature_extractor, _ = build(kind, weighted=weighted)
    model.eval()
    with torch.no_grad():
        together = model(**pad(feature_extractor, clips)).logits
        for row, clip in enumerate(clips):
            alone = model(**pad(feature_extractor, [clip])).logits[0]
            given = together[row] if kind == "classification" else together[row, : len(alone)]
            torch.testing.assert_close(given, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", LABELS)
def test_gradients_reach_all_that_is_trained(build, kind, clips):
    model, feature_extractor, notes = build(kind, weighted=True)
    model.train()
    model(**pad(feature_extractor, clips), labels=LABELS[kind]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != is_frozen(model, name), name
        assert not parameter.requires_grad or parameter.grad is not None, name
    assert model.layer_weights.grad.isfinite().all()
    if len(model.layer_weights) > 1:
        assert (model.layer_weights.grad != 0).all()
    else:
        assert "one layer: nothing to weigh" in notes


def test_the_front_end_is_frozen_by_the_option(build, system):
    model, _, _ = build("ctc")
    model.freeze_feature_encoder()
    if system != "code_bert":  # whose front end is frozen anyway; the codes' embeddings are learned
        assert not model.base_model.extract_features(torch.randn(1, 8000)).requires_grad
    assert model(torch.randn(1, 8000)).logits.requires_grad
    assert any(parameter.requires_grad for parameter in model.base_model.parameters())


def test_classes_of_frames(system, pretrained, clips):
    model = AUTO["frames"].from_pretrained(pretrained(system), num_labels=3)
    feature_extractor = transformers.AutoFeatureExtractor.from_pretrained(pretrained(system))
    batch = pad(feature_extractor, clips)
    frames = model._get_feat_extract_output_lengths(max(LENGTHS))
    outputs = model(**batch, labels=torch.zeros(3, frames, dtype=torch.int64))
    assert outputs.logits.shape == (3, frames, 3)
    assert outputs.loss.isfinite()


WORDS = {"low": [300], "high": [2400], "up": [300, 2400], "down": [2400, 300]}
TASKS = {
    "classification": ({"label_column_name": "kind"}, "audio-classification"),
    "ctc": ({"text_column_name": "said"}, "automatic-speech-recognition"),
}


@pytest.fixture
def finetune(sound, labeled_folder, finetune_args, system, pretrained):
    clips = {
        f"{word}/{index}.wav": sound(pitches, 0.6, index) for word, pitches in WORDS.items() for index in range(2)
    }
    folder = labeled_folder(clips, {name: dict.fromkeys(("said", "kind"), name.split("/")[0]) for name in clips})

    def run(task: str, **options):
        columns, _ = TASKS[task]
        settings = {"test_split_name": "train", "batch_seconds": 5, "eval_strategy": "no", **columns, **options}
        return run_finetune.main(finetune_args(task, folder, model_name_or_path=pretrained(system), **settings))

    return run


@pytest.mark.parametrize("task", TASKS)
def test_a_probe_leaves_the_encoder_alone_and_runs_in_a_pipeline(finetune, task, system, pretrained, sound, tmp_path):
    """Frozen for good, layers weighted; transformers' pipeline hears what our evaluation heard."""
    finetune(task, max_steps=3, freeze_encoder_steps=3, weighted_layer_sum=True, learning_rate=1e-2)
    model = AUTO[task].from_pretrained(tmp_path / "out")
    encoder = transformers.AutoModel.from_pretrained(pretrained(system)).state_dict()
    for name, value in model.base_model.state_dict().items():
        assert torch.equal(value, encoder[name]), name
    pipe = transformers.pipeline(TASKS[task][1], model=str(tmp_path / "out"), device="cpu")
    for item in read_json(tmp_path / "out" / "predictions_train.json")["predictions"]:
        word, index = item["name"].removesuffix(".wav").split("/")
        heard = pipe(sound(WORDS[word], 0.6, int(index)))
        assert (heard[0]["label"] if task == "classification" else heard["text"]) == item["prediction"]


def test_four_sounds_are_learned_by_heart(finetune):
    """SpecAugment and dropout on, as a user has them."""
    settings = {"freeze_encoder_steps": 0, "freeze_feature_encoder": False, "learning_rate": 5e-3, "max_steps": 100}
    assert finetune("classification", **settings)["train_accuracy"] == 1.0


def test_letters_are_learned_by_heart(system, pretrained):
    """CTC: a tone for each letter and silence behind it. What ignores the audio can't get below 1.79, log(6)."""
    torch.manual_seed(0)
    settings = {"vocab_size": 4, "final_dropout": 0.0}
    model = AUTO["ctc"].from_pretrained(pretrained(system), **settings)
    if system == "vq_wav2vec":
        model.freeze_feature_encoder()  # as by default: what goes through hard choices learns slower than this
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    words = [[1, 2], [2, 1], [3, 1, 2], [2, 3, 1], [1, 3], [3, 2]]
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(word) for word in words], True, -100)
    batch = pad(transformers.AutoFeatureExtractor.from_pretrained(pretrained(system)), [spell(word) for word in words])
    losses = []
    for _ in range(200):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / len(words))
    assert min(losses) < 1.4


def spell(word: list[int]) -> np.ndarray:
    pitches = np.repeat([pitch for letter in word for pitch in ((300, 1000, 3000)[letter - 1], 0)], 1280)
    noise = np.random.default_rng(0).standard_normal(len(pitches))
    tones = np.sin(2 * np.pi * np.cumsum(pitches) / 16_000) * (pitches > 0)
    return (0.3 * tones + 0.01 * noise).astype(np.float32)

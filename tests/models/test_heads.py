"""Heads on a toy encoder: transformers' losses, padding, SpecAugment, weighted layers, freezing, files, toy sets."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from toy_encoder import HEADS, HOP, ToyConfig, ToyModel, ToyPreTrainedModel
from transformers.modeling_outputs import Wav2Vec2BaseModelOutput

from acoustic.models.heads import EncoderConfig, augment, draw_hidden

AUTO = {
    "ctc": transformers.AutoModelForCTC,
    "classification": transformers.AutoModelForAudioClassification,
    "frames": transformers.AutoModelForAudioFrameClassification,
}
STOCK = {
    "ctc": transformers.Wav2Vec2ForCTC,
    "classification": transformers.Wav2Vec2ForSequenceClassification,
    "frames": transformers.Wav2Vec2ForAudioFrameClassification,
}
KINDS = tuple(HEADS)


def make(kind: str, **settings):
    torch.manual_seed(0)
    settings = {"num_labels": 3, "vocab_size": 6, "final_dropout": 0.0, **settings}
    return HEADS[kind](ToyConfig(**settings))


@pytest.fixture(scope="module")
def batch() -> dict:
    """Clips of 30, 20 and 11 frames, padded."""
    lengths = torch.tensor([30, 20, 11]) * HOP
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(30 * HOP) < lengths[:, None]).long()
    return {"input_values": torch.randn(3, 30 * HOP, generator=generator) * mask, "attention_mask": mask}


LABELS = {
    "ctc": torch.tensor([[1, 2, 2, 5], [3, 4, -100, -100], [1, 1, 3, -100]]),
    "classification": torch.tensor([2, 0, 1]),
    "frames": torch.randint(0, 3, (3, 30), generator=torch.Generator().manual_seed(1)),
}


def test_classes_are_named_after_their_system():
    assert [cls.__name__ for cls in HEADS.values()] == [
        "ToyForCTC",
        "ToyForSequenceClassification",
        "ToyForAudioFrameClassification",
    ]
    assert all(issubclass(cls, ToyPreTrainedModel) and cls.config_class is ToyConfig for cls in HEADS.values())


def test_every_setting_of_a_head_is_known_to_the_config():
    """Else it could not be changed by config_overrides; defaults are those of wav2vec 2.0, but nothing is masked."""
    known, theirs = ToyConfig().to_dict(), transformers.Wav2Vec2Config().to_dict()
    names = set(EncoderConfig.__annotations__)
    assert names <= known.keys() & theirs.keys()
    assert {name for name in names if known[name] != theirs[name]} == {
        "mask_time_prob",
        "bos_token_id",
        "eos_token_id",
    }


def test_a_config_with_an_init_of_its_own_takes_the_settings_too():
    class OwnInit(EncoderConfig):
        model_type = "own_init"

        def __init__(self, width=3, **kwargs):
            self.width = width
            super().__init__(**kwargs)

    config = OwnInit(width=4, vocab_size=9, num_labels=5)
    assert (config.width, config.vocab_size, config.num_labels, config.classifier_proj_size) == (4, 9, 5, 256)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_padded_clip_gives_what_it_gives_alone(kind, weighted, batch):
    model = make(kind, use_weighted_layer_sum=weighted).eval()
    with torch.no_grad():
        together = model(**batch).logits
        for row, frames in enumerate((30, 20, 11)):
            clip = batch["input_values"][row : row + 1, : frames * HOP]
            alone = model(clip).logits[0]
            given = together[row] if kind == "classification" else together[row, :frames]
            torch.testing.assert_close(given, alone, rtol=1e-5, atol=1e-6)


def stock(kind: str, model, batch: dict):
    """transformers' head for wav2vec 2.0 with the weights of ours, on the frames that our encoder gives."""
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=[4] * 7
    )
    for name in ("num_labels", "vocab_size", "ctc_loss_reduction", "ctc_zero_infinity", "use_weighted_layer_sum"):
        setattr(config, name, getattr(model.config, name))
    config.num_conv_pos_embeddings = config.num_conv_pos_embedding_groups = 2
    theirs = STOCK[kind](config).eval()
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("toy.")}
    assert not theirs.load_state_dict(own, strict=False).unexpected_keys
    outputs = model.toy.contextualize(
        model.toy.extract_features(batch["input_values"]),
        model.toy._get_feature_vector_attention_mask(30, batch["attention_mask"]),
        output_hidden_states=True,
    )
    theirs.wav2vec2.forward = lambda *args, **kwargs: Wav2Vec2BaseModelOutput(
        last_hidden_state=outputs.last_hidden_state, hidden_states=outputs.hidden_states
    )
    theirs._get_feat_extract_output_lengths = model._get_feat_extract_output_lengths
    theirs._get_feature_vector_attention_mask = model._get_feature_vector_attention_mask
    return theirs


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ctc", {"ctc_loss_reduction": "sum"}),
        ("ctc", {"ctc_loss_reduction": "mean"}),
        ("classification", {}),
        ("classification", {"use_weighted_layer_sum": True}),
        ("frames", {}),
        ("frames", {"use_weighted_layer_sum": True}),
    ],
)
@pytest.mark.parametrize("padded", [True, False])
def test_a_head_is_transformers_on_the_same_frames(kind, settings, padded, batch):
    """Logits, loss and gradients; padding has no class for each frame in ours, so there it is left out."""
    if not padded:
        batch = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    model = make(kind, **settings).eval()
    labels = F.one_hot(LABELS[kind], 3) if kind == "frames" else LABELS[kind]
    given = batch if padded else {"input_values": batch["input_values"]}
    ours, theirs = model(**given, labels=labels), stock(kind, model, batch)
    reference = theirs(**given, labels=labels)
    torch.testing.assert_close(ours.logits, reference.logits)
    if kind == "frames" and padded:
        return
    torch.testing.assert_close(ours.loss, reference.loss)
    ours.loss.backward()
    reference.loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("toy."):
            torch.testing.assert_close(parameter.grad, gradients[name].grad)


def test_a_transcript_that_does_not_fit_is_infinite_or_left_out(batch):
    labels = torch.tensor([[1] * 40, [1] + [-100] * 39, [2] + [-100] * 39])
    assert make("ctc").eval()(**batch, labels=labels).loss.isinf()
    loss = make("ctc", ctc_zero_infinity=True).eval()(**batch, labels=labels).loss
    part = make("ctc").eval()(**{name: value[1:] for name, value in batch.items()}, labels=labels[1:]).loss
    torch.testing.assert_close(loss, part)


def test_labels_that_the_vocabulary_lacks(batch):
    with pytest.raises(ValueError, match="labels must be below vocab_size, 6"):
        make("ctc")(**batch, labels=torch.tensor([[6], [1], [1]]))


def test_frames_of_padding_have_no_class(batch):
    model = make("frames").eval()
    labels = LABELS["frames"]
    outputs = model(**batch, labels=labels)
    real = torch.arange(30) < (batch["attention_mask"].sum(-1) // HOP)[:, None]
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits[real], labels[real]))
    one_hot = F.one_hot(labels, 3)
    torch.testing.assert_close(model(**batch, labels=one_hot).loss, outputs.loss)
    labels = labels.clone()
    labels[:, 3:] = -100
    torch.testing.assert_close(
        model(**batch, labels=labels).loss,
        F.cross_entropy(outputs.logits[:, :3].flatten(0, 1), labels[:, :3].flatten()),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_layers_are_their_mean_at_first_and_learn(kind, batch):
    model = make(kind, use_weighted_layer_sum=True).eval()
    outputs = model(**batch, labels=LABELS[kind], output_hidden_states=True)
    assert len(outputs.hidden_states) == len(model.layer_weights) == 3
    hidden, _, _ = model.encode(**batch, output_hidden_states=False)
    torch.testing.assert_close(hidden, torch.stack(outputs.hidden_states).mean(0))
    outputs.loss.backward()
    assert (model.layer_weights.grad != 0).all()
    with torch.no_grad():
        model.layer_weights[1] = 30.0
        chosen, _, _ = model.encode(**batch, output_hidden_states=False)
    torch.testing.assert_close(chosen, outputs.hidden_states[1])


def test_another_number_of_layers_than_the_config_says_is_an_error(batch):
    model = make("ctc", use_weighted_layer_sum=True, num_hidden_states=2)
    assert len(model.layer_weights) == 2
    with pytest.raises(ValueError, match="zip"):
        model(**batch)


MASKED = {"mask_time_prob": 0.5, "mask_time_length": 4, "mask_feature_prob": 0.3, "mask_feature_length": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_spec_augment_is_for_training_alone(kind, batch):
    model = make(kind, **MASKED)
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    torch.manual_seed(3)
    first, second = model(**batch).logits, model(**batch).logits
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(model(**batch).logits, first)  # what is drawn follows torch's generator: runs resume exactly
    model.config.apply_spec_augment = False
    assert torch.equal(model(**batch).logits, model.eval()(**batch).logits)


def test_spans_hide_the_share_asked_for_and_padding_counts_for_nothing(batch):
    real = torch.arange(400) < torch.tensor([400, 200] * 100)[:, None]
    features = torch.ones(200, 400, 240)
    torch.manual_seed(0)
    config = ToyConfig(mask_time_prob=0.5, mask_time_length=10)
    hidden = (augment(features, real, config) == 0).all(-1)
    # Overlaps allowed: 1 - exp(-.5) = .39 of the frames, in long clips and in short ones.
    for length in (400, 200):
        rows = slice(None, None, 2) if length == 400 else slice(1, None, 2)
        assert hidden[rows, :length].float().mean().item() == pytest.approx(0.39, abs=0.03)
    config = ToyConfig(mask_feature_prob=0.5, mask_feature_length=10)
    channels = augment(features, real, config) == 0
    assert torch.equal(channels, channels[:, :1].expand_as(channels))  # for the whole clip
    assert channels.float().mean().item() == pytest.approx(0.39, abs=0.05)


@pytest.mark.parametrize("frames", [1, 3, 12])
def test_a_clip_is_never_hidden_whole(frames):
    """Spans of 20 frames, beside a longer clip and alone: what would leave nothing is not applied."""
    generator = torch.Generator().manual_seed(0)
    real = torch.arange(60) < torch.tensor([60, frames])[:, None]
    for _ in range(50):
        hidden = draw_hidden(2, 60, 0.9, 20, generator, real)
        assert (real & ~hidden).any(1).all()
        assert not draw_hidden(2, frames, 0.9, 20, generator).all(1).any()


def test_hiding_does_not_write_into_the_features():
    features = torch.ones(2, 50, 24)
    augment(features, None, ToyConfig(**MASKED))
    assert (features == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_freezing(kind, batch):
    model = make(kind, use_weighted_layer_sum=True)
    model.freeze_feature_encoder()
    model(**batch, labels=LABELS[kind]).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    own = {name for name in model.state_dict() if not name.startswith("toy.")}
    assert trained == own | {
        f"toy.{name}" for name, _ in model.toy.named_parameters() if name.startswith(("widen", "layers"))
    }
    model = make(kind, use_weighted_layer_sum=True)
    model.freeze_base_model()
    model(**batch, labels=LABELS[kind]).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == own


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_through_the_auto_classes(kind, batch, tmp_path):
    model = make(kind, use_weighted_layer_sum=True, id2label={0: "a", 1: "b", 2: "c"}).eval()
    with torch.no_grad():
        model.layer_weights.copy_(torch.tensor([0.1, 0.2, 0.3]))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [HEADS[kind].__name__]
    assert config["use_weighted_layer_sum"] is True
    loaded, info = AUTO[kind].from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is HEADS[kind]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_on_a_pretrained_encoder_starts_as_transformers_has_it(kind, tmp_path):
    """Not from what was in memory, though the encoder's `_init_weights` knows nothing of it."""
    torch.manual_seed(5)
    encoder = ToyModel(ToyConfig())
    encoder.save_pretrained(tmp_path)
    model, info = AUTO[kind].from_pretrained(
        tmp_path, use_weighted_layer_sum=True, num_labels=40, vocab_size=40, output_loading_info=True
    )
    own = {name for name in model.state_dict() if not name.startswith("toy.")}
    assert set(info["missing_keys"]) == own
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, model.toy.state_dict()[name]), name
    for name in own:
        value = model.state_dict()[name]
        if name.endswith(".weight"):
            assert value.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert (value == 0).all(), name


def test_autocast_stays_near(batch):
    for kind in KINDS:
        model = make(kind).eval()
        reference = model(**batch, labels=LABELS[kind]).loss
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, labels=LABELS[kind]).loss
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, reference, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_toy_set_is_learned_by_heart(kind, batch):
    model = make(kind, use_weighted_layer_sum=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200 if kind == "ctc" else 50):
        loss = model(**batch, labels=LABELS[kind]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1

"""Normalisation, vocabulary, what is skipped by name, budgets in minutes, error rates, times, a toy set by heart."""

import json
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
from toy_encoder import ToyConfig, ToyModel
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Processor

import run_finetune
from acoustic.config import parse_finetuning
from acoustic.console import UserError
from acoustic.data.headers import Header, Skip
from acoustic.data.sources import open_rows
from acoustic.data.spans import read_audacity
from acoustic.report.record import read_json
from acoustic.tasks.ctc import CTC, PAD, WORST, ErrorRates, normalize, refuse_too_long
from acoustic.tasks.events import FrameGrid
from acoustic.training.finetuning import FinetuningStep

LIMITS = type("Limits", (), {"min_duration_in_seconds": 0.1, "max_duration_in_seconds": 2.0})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("  two\tspaces \n", "two spaces"),
        ("Don\u2019t \u2018quote\u2019 'me'", "don't quote me"),
        ("co-operate", "co operate"),
        ("Straße ÉTÉ", "straße été"),
        ("e\u0301te\u0301", "été"),
        ("ﬁne \uff21", "fine a"),
        ("नमस्ते", "नमस्ते"),
        ("Привет, мир", "привет мир"),
        ("room 42", "room 42"),
        ("...", ""),
        ("''", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_normalisation(text, expected):
    assert normalize(text) == expected
    assert normalize(expected) == expected


@pytest.fixture
def task(rows_of):
    return CTC(rows_of("text", ["Don't stop!", "été", None, "?"]), None)


def test_the_vocabulary_is_that_of_the_normalised_texts(task):
    assert list(task.vocabulary) == ["[PAD]", "[UNK]", "|", "'", "d", "n", "o", "p", "s", "t", "é"]
    assert list(task.vocabulary.values()) == list(range(11))
    notes = task.notes()
    assert notes[0].startswith("2 transcripts, 3 words; vocabulary of 11: 'dnopsté")
    assert "2 transcripts are empty after normalisation: skipped" in notes


def test_digits_are_warned_of(rows_of):
    assert any("digits" in note for note in CTC(rows_of("text", ["room 42"]), None).notes())


def test_no_text_at_all(rows_of):
    with pytest.raises(UserError, match="text_column_name: some rows has no text in its column 'said'"):
        CTC(rows_of("text", [None, "!"]), type("Arguments", (), {"text_column_name": "said"}))


def spell(task, text: str) -> list[int]:
    """One frame a character, with a blank after each, as a perfect model would emit them."""
    ids = task.encode({"text": text})
    return [token for id_ in ids for token in (id_, task.vocabulary[PAD])]


@pytest.mark.parametrize("text", ["don't stop", "été", "toot toot", "s'nd nt't do"])
def test_the_tokenizer_gives_back_what_it_was_given(task, text):
    logits = torch.nn.functional.one_hot(torch.tensor([spell(task, text)]), len(task.vocabulary)).float()
    decoded = task.predictions(logits, {"names": ["x"], "texts": [text]})
    assert decoded == [{"name": "x", "prediction": text, "reference": text}]


def test_a_character_that_training_never_saw_is_an_error_and_no_crash(task):
    assert task.vocabulary["[UNK]"] in task.encode({"text": "stopx"})
    logits = torch.nn.functional.one_hot(torch.tensor([spell(task, "stop")]), len(task.vocabulary)).float()
    collected = task.predictions(logits, {"names": ["x"], "texts": ["Stop, x"]})
    assert collected[0]["reference"] == "stop x"
    metrics = task.metrics(collected)
    assert metrics["wer"] == 0.5
    assert metrics["cer"] == pytest.approx(2 / 6)


def test_transcripts_need_a_frame_per_character_and_one_between_equal_ones():
    refuse_too_long("abc", 3)
    refuse_too_long("aab", 4)
    with pytest.raises(Skip, match="the transcript needs 4 frames, the audio has 3"):
        refuse_too_long("aab", 3)


def test_the_limit_is_where_the_loss_becomes_infinite(task):
    """Against torch's own: the shortest length with a finite loss is the one that is let through."""
    for text in ("stop", "toot", "stoop", "nnn"):
        labels = torch.tensor([task.encode({"text": text})])
        for frames in range(1, 9):
            logits = torch.zeros(frames, 1, len(task.vocabulary)).log_softmax(-1)
            loss = torch.nn.functional.ctc_loss(logits, labels, (frames,), (labels.shape[1],))
            try:
                refuse_too_long(text, frames)
                assert loss.isfinite()
            except Skip:
                assert loss.isinf()


def made(plan):
    """The plan for rows of a text alone."""
    return lambda row, header, generator: plan({"audio": {"path": "x.wav"}, **row}, header, generator)


def test_what_can_not_be_trained_on_is_skipped(task):
    task.mask_length = 0
    header = Header(frames=16000, rate=16000, channels=1)
    train, evaluation = (made(task.plan(LIMITS, lambda seconds: 5, train)) for train in (True, False))
    assert len(train({"text": "stop"}, header, None)) == 1
    with pytest.raises(Skip, match="the transcript needs 7 frames, the audio has 5"):
        train({"text": "don't!!t"}, header, None)
    assert len(evaluation({"text": "don't!!t"}, header, None)) == 1  # it counts, as errors
    for plan in (train, evaluation):
        with pytest.raises(Skip, match="empty transcript"):
            plan({"text": "?!"}, header, None)
    task.mask_length = 5
    with pytest.raises(Skip, match="5 frames are too few for masked spans of 5"):
        train({"text": "stop"}, header, None)
    assert len(evaluation({"text": "stop"}, header, None)) == 1  # nothing is masked there


@pytest.mark.parametrize(
    ("reference", "prediction", "wer", "cer"),
    [
        ("a b c d", "a b c d", 0, 0),
        ("a b c d", "a x c d", 1 / 4, 1 / 7),
        ("a b c d", "", 1, 1),
        ("one", "one two three", 2, 10 / 3),
    ],
)
def test_error_rates_on_cases_by_hand(reference, prediction, wer, cer):
    rates = ErrorRates(keep_in_memory=True).compute(predictions=[prediction], references=[reference])
    assert rates == pytest.approx({"wer": wer, "cer": cer})


def test_error_rates_are_jiwers_over_all_words_together(task):
    """Not the mean over utterances: a long one weighs more."""
    references, predictions = ["a", "b c d e f g"], ["x", "b c d e f g"]
    collected = [{"name": "", "prediction": p, "reference": r} for p, r in zip(predictions, references)]
    metrics = task.metrics(collected)
    assert metrics["wer"] == jiwer.wer(references, predictions) == pytest.approx(1 / 7)
    assert metrics["cer"] == jiwer.cer(references, predictions)
    assert metrics["empty_fraction"] == 0


def collected(empty: int, total: int = 20) -> list[dict]:
    return [{"name": "", "prediction": "" if i < empty else "a", "reference": "a"} for i in range(total)]


@pytest.mark.parametrize(("empty", "said"), [(20, True), (19, True), (18, False), (0, False)])
def test_the_blank_phase_is_explained(task, group_norm_checkpoint, capsys, empty, said):
    model = torch.nn.Module()
    model.base_model = torch.nn.Linear(1, 1)
    step = FinetuningStep(model, task, freeze_encoder_steps=0)
    for update in range(7):
        step.before_forward(model, update)
    step.metrics(collected(empty))
    out = capsys.readouterr().out
    assert out.count("\n") == said
    words = [
        "after 7 updates",
        "only blanks",
        "usual",
        "max_steps",
        "learning_rate",
        "freeze_encoder_steps",
        "transcripts",
    ]
    assert all(word in out for word in words) is said


@pytest.fixture
def build(task):
    def make(checkpoint, seconds=600.0, **options):
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        model_args, _, _ = parse_finetuning(
            ["--model_name_or_path", checkpoint, "--dataset_name", "x", "--output_dir", "x", *words]
        )
        return task.build(model_args, False, seconds)

    return make


def test_the_head_has_the_vocabularys_size_and_the_encoder_its_weights(build, task, group_norm_checkpoint):
    model, _, notes = build(group_norm_checkpoint)
    assert model.lm_head.out_features == len(task.vocabulary)
    assert model.config.pad_token_id == task.vocabulary[PAD]
    assert notes[1] == "new head with random weights: lm_head"


def test_another_vocabulary_than_the_checkpoints_gets_a_new_head(build, task, ctc_checkpoint):
    model, _, notes = build(ctc_checkpoint)
    assert model.lm_head.out_features == len(task.vocabulary) != 12
    assert "new head" in notes[1]


@pytest.mark.parametrize(
    ("hours", "time", "channel", "layerdrop"), [(0.2, 0.65, 0.25, 0.1), (10, 0.65, 0.5, 0.05), (100, 0.65, 0.5, 0.1)]
)
def test_masking_by_the_hours_of_labels(build, group_norm_checkpoint, hours, time, channel, layerdrop):
    config = build(group_norm_checkpoint, hours * 3600)[0].config
    assert (config.mask_time_prob, config.mask_feature_prob, config.layerdrop) == (time, channel, layerdrop)
    overridden = build(group_norm_checkpoint, hours * 3600, config_overrides='{"layerdrop": 0.3}')[0].config
    assert overridden.layerdrop == 0.3


def test_a_clip_is_read_the_same_alone_and_beside_a_longer_one(build, task, layer_norm_checkpoint):
    """What the model makes of the padding behind a clip is no part of its hypothesis."""
    model, feature_extractor, _ = build(layer_norm_checkpoint)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that something else than one token is heard everywhere
    model.eval()
    clips = [np.random.default_rng(seed).standard_normal(length) for seed, length in enumerate((7000, 24000))]
    step, heard = FinetuningStep(model, task, 0), []
    for given in (clips, clips[:1]):
        batch = {
            **feature_extractor(given, sampling_rate=16000, padding=True, return_tensors="pt"),
            "names": ["short", "long"][: len(given)],
            "texts": ["stop", "stop"][: len(given)],
        }
        with torch.no_grad():
            heard.append(step.collect(step.forward(model, batch), batch)[0]["prediction"])
    assert heard[0] == heard[1] != ""


def test_an_encoder_of_another_size_is_refused(build, group_norm_checkpoint):
    """It would silently start from random weights."""
    with pytest.raises(UserError, match="lacks weights of the encoder, or has them in another size"):
        build(group_norm_checkpoint, config_overrides='{"intermediate_size": 48}')


def test_no_loss_is_infinite(build, task, group_norm_checkpoint):
    """Even where more characters than frames slip through, as in an evaluation."""
    model, _, _ = build(group_norm_checkpoint)
    labels = torch.tensor([task.encode({"text": "stop " * 20})])
    loss = model.eval()(torch.randn(1, 4000), labels=labels).loss
    assert loss == 0


# ---- what a test split gets: places, times, the worst utterances


def one_hot(task, ids: list[int]) -> torch.Tensor:
    """(1, frames, vocabulary) logits of which softmax makes nearly certain tokens."""
    return 10.0 * torch.nn.functional.one_hot(torch.tensor([ids]), len(task.vocabulary)).float()


@pytest.fixture
def settled(task):
    """In frames of 20 ms, as `build` and `settle` leave a task."""
    task.grid, task.output_lengths = FrameGrid(16_000, 320, 160.0), lambda samples: samples // 320
    task.settle(None)
    return task


def test_times_of_the_reference(settled):
    pad, ids = settled.vocabulary[PAD], settled.encode({"text": "do"})
    batch = {"names": ["x"], "texts": ["Do!"], "places": [{"seconds": 0.1, "path": "/a/x.wav"}]}
    # The padding behind the recording's five frames is not listened to.
    (item,) = settled.predictions(one_hot(settled, [pad, ids[0], pad, ids[1], pad, ids[0], ids[0]]), batch)
    assert (item["prediction"], item["reference"], item["path"]) == ("do", "do", "/a/x.wav")
    (word,) = item["alignment"]["words"]
    assert (word["word"], word["start"], word["end"]) == ("do", 0.02, 0.08)
    assert word["confidence"] > 0.99
    assert [token["token"] for token in item["alignment"]["tokens"]] == ["d", "o"]


def test_a_transcript_that_does_not_fit_has_no_times(settled):
    batch = {"names": ["x"], "texts": ["don't stop"], "places": [{"seconds": 0.1, "path": None}]}
    (item,) = settled.predictions(one_hot(settled, [0] * 5), batch)
    assert item["alignment"] is None and item["prediction"] == ""


def test_the_worst_utterances_in_the_model_card(task):
    items = [("best.wav", "stop", "stop"), ("b.wav", "do", "do stop"), ("a.wav", "do not", "")]
    given = [
        {"name": name, "path": f"/data/{name}", "reference": reference, "prediction": said}
        for name, reference, said in items
    ]
    readable = task.readable(given)
    assert [(item["name"], item["path"]) for item in readable] == [
        ("b.wav", "/data/b.wav"),
        ("a.wav", "/data/a.wav"),
        ("best.wav", "/data/best.wav"),
    ]
    ((title, lines),) = task.sections("test", given).items()
    assert title == "Worst utterances of test"
    assert lines[0] == "1 of 3 answers are empty."
    assert lines[4:] == ["| 1.00 | 2.50 | b.wav | do | do stop |", "| 1.00 | 1.00 | a.wav | do not |  |"]
    assert task.sections("test", given[:1]) == {}
    assert not any("empty" in line for line in task.sections("test", given[:2])["Worst utterances of test"])
    many = task.sections("test", given[1:2] * (WORST + 3))["Worst utterances of test"]
    assert len(many) == WORST + 4 and many[-1].startswith(f"{WORST + 3} have errors; predictions_test.json")


# ---- budgets


@pytest.fixture
def spoken(audio_folder, tmp_path):
    """Rows of ten recordings of 3 s, one more that says nothing, and one that is too long."""
    folder = audio_folder(12, seconds=[3.0] * 10 + [3.0, 9.0], root=tmp_path / "spoken")
    lines = ["file_name,text"] + [f"clip_{n:03d}.wav,{'?!' if n == 10 else 'do'}" for n in range(12)]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return open_rows(str(folder), "train", text_column="text", indexed=True)


def names(rows) -> set[str]:
    return {rows[index]["name"] for index in range(len(rows))}


def test_a_budget_of_minutes(spoken):
    arguments = type("Arguments", (), {"min_duration_in_seconds": 0.1, "max_duration_in_seconds": 5.0})
    task = CTC(spoken, arguments)
    usable = {f"clip_{n:03d}.wav" for n in range(10)}
    small, large = (task.subset(spoken, minutes, 0) for minutes in (0.1, 0.25))
    assert (len(small), len(large)) == (2, 5)
    assert names(small) < names(large) < usable
    assert names(task.subset(spoken, 0.25, 0)) == names(large) != names(task.subset(spoken, 0.25, 1))
    assert names(task.subset(spoken, 0.5, 3)) == usable
    assert len(task.subset(spoken, None, 0)) == 12  # the rest is skipped by name, later
    with pytest.raises(UserError, match="2 minutes asked for, .* has 0.5 to use"):
        task.subset(spoken, 2, 0)


# ---- whole runs


WORDS = {"low": [300], "high": [2400], "up": [300, 2400], "down": [2400, 300]}


def test_four_tone_words_are_learned_by_heart(sound, labeled_folder, finetune_args, tmp_path, capsys):
    """Bad rows beside them are skipped by name: empty, too long for its frames, not audio."""
    clips = {
        f"{word}_{index}.wav": sound(pitches, 0.6, index) for word, pitches in WORDS.items() for index in range(2)
    }
    metadata = {name: {"said": name.split("_")[0].title() + "!"} for name in clips}
    clips |= {"empty.wav": sound([500], 0.6, 0), "long.wav": sound([500], 0.2, 0)}
    metadata |= {"empty.wav": {"said": "?!"}, "long.wav": {"said": "wood " * 20}}
    argv = finetune_args(
        "ctc",
        labeled_folder(clips, metadata),
        text_column_name="said",
        eval_split_name="train",
        test_split_name="train",
        random_weights=True,
        learning_rate=5e-3,
        max_steps=200,
        eval_steps=50,
        batch_seconds=5,
        max_skipped_fraction=0.5,
        config_overrides={"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "hidden_dropout": 0.0, "layerdrop": 0.0},
    )
    results = run_finetune.main(argv)
    predictions = read_json(tmp_path / "out" / "predictions_train.json")["predictions"]
    assert np.isfinite(results["train_loss"])
    learned = [item for item in predictions if item["name"] != "long.wav"]
    assert [item["prediction"] for item in learned] == [item["reference"] for item in learned]
    assert len(learned) == 8
    skipped = read_json(tmp_path / "out" / "data_report.json")["splits"]["train"]["skipped_recordings"]
    assert skipped["empty.wav"] == "empty transcript"
    assert skipped["long.wav"].startswith("the transcript needs")
    processor = Wav2Vec2Processor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.get_vocab().keys() >= set("lowhighupdn")


TONES = {"e": 500, "o": 2400}


@pytest.fixture
def tone_words(sound, labeled_folder):
    """make(number) -> folder and {name: onsets}: one or two tones of 0.15 s somewhere in 0.6 s of noise."""

    def make(number: int):
        generator, clips, metadata, onsets = np.random.default_rng(0), {}, {}, {}
        for index in range(number):
            places = np.sort(generator.permutation(2)[: generator.integers(1, 3)])
            said = generator.choice(list(TONES), len(places))
            starts = places * 0.3 + generator.uniform(0.02, 0.12, len(places))
            waveform = 0.01 * generator.standard_normal(9_600).astype(np.float32)
            for tone, start in zip(said, starts):
                burst = sound([TONES[tone]], 0.15, index)
                waveform[int(start * 16_000) :][: len(burst)] += burst * np.hanning(len(burst))  # without clicks
            name = f"{index:02d}.wav"
            clips[name], metadata[name], onsets[name] = waveform, {"text": "".join(said)}, starts
        return labeled_folder(clips, metadata), onsets

    return make


@pytest.fixture
def toy_checkpoint(tmp_path):
    """An encoder whose frames, one every 10 ms, hear nothing but themselves."""
    torch.manual_seed(0)
    model = ToyModel(ToyConfig(num_hidden_layers=0))
    torch.nn.init.ones_(model.front["scale"].weight)
    model.save_pretrained(tmp_path / "toy")
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(tmp_path / "toy")
    return str(tmp_path / "toy")


def test_times_are_where_the_tones_are(tone_words, toy_checkpoint, finetune_args, tmp_path):
    """And what a beam search makes of them; label files, and where the audio of the worst utterances is."""
    folder, onsets = tone_words(32)
    argv = finetune_args(
        "ctc",
        folder,
        model_name_or_path=toy_checkpoint,
        test_split_name="train",
        decoding="beam",
        beam_width=20,
        learning_rate=2e-2,
        freeze_encoder_steps=0,
        freeze_feature_encoder=False,
        max_steps=150,
        batch_seconds=16,
        config_overrides={"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "final_dropout": 0.0},
    )
    results = run_finetune.main(argv)
    out = tmp_path / "out"
    aligned = [json.loads(line) for line in (out / "alignments_train.jsonl").read_text().splitlines()]
    assert [item["name"] for item in aligned] == sorted(onsets)
    # CTC says a character in one frame of its sound.
    away = np.array(
        [
            (token["start"] + token["end"]) / 2 - onset
            for item in aligned
            for token, onset in zip(item["tokens"], onsets[item["name"]], strict=True)
        ]
    )
    assert np.mean((away > 0) & (away < 0.15)) > 0.9
    # Any of its frames could say it, so none is sure, and greedily none does; together they are.
    assert results["train_wer"] < 0.15 < results["train_greedy_wer"]
    tracks = sorted((out / "words_train").iterdir())
    assert len(tracks) == 32
    spans = read_audacity(str(tracks[0]))
    assert [(span.label, span.start) for span in spans] == [(w["word"], w["start"]) for w in aligned[0]["words"]]
    assert "| train_greedy_wer |" in (out / "README.md").read_text(encoding="utf-8")
    worst = read_json(out / "predictions_train.json")["predictions"][0]
    assert worst["wer"] > 0 and Path(worst["path"]).name in (out / "README.md").read_text(encoding="utf-8")

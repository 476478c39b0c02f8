"""The main job: pretrain -> fine-tune -> load in plain transformers, in a process without this repo -> predict."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile

import run_finetune
import run_pretrain

pytestmark = pytest.mark.figures

PLAIN_TRANSFORMERS = """
import sys
import soundfile
import transformers
pretrained, classifier, recognizer, wav = sys.argv[1:]
waveform, rate = soundfile.read(wav, dtype="float32")  # a file name would need the ffmpeg program
audio = {"raw": waveform, "sampling_rate": rate}
for cls in (transformers.Wav2Vec2ForPreTraining, transformers.Wav2Vec2ForCTC, transformers.AutoModel):
    model, info = cls.from_pretrained(pretrained, output_loading_info=True)
    encoder = [key for key in info["missing_keys"] if not key.startswith(("lm_head",))]
    assert not encoder, (cls, encoder)
answers = transformers.pipeline("audio-classification", classifier)(dict(audio))
assert {answer["label"] for answer in answers} == {"high", "low"}, answers
print("CLASS", answers[0]["label"])
print("TEXT", transformers.pipeline("automatic-speech-recognition", recognizer)(dict(audio))["text"])
assert not any(name.split(".")[0] == "acoustic" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two kinds of tone, each a word: 'low' and 'high'; a folder per kind and a manifest with the words."""
    root = tmp_path_factory.mktemp("world")
    generator = np.random.default_rng(0)
    lines = ["path,text"]
    for number in range(24):
        kind = ("low", "high")[number % 2]
        time = np.arange(16_000) / 16_000
        tone = np.sin(2 * np.pi * (300 if kind == "low" else 2400) * generator.uniform(0.95, 1.05) * time)
        path = root / "train" / kind / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.3 * tone + 0.01 * generator.standard_normal(len(time)), 16_000)
        lines.append(f"train/{kind}/{number}.wav,{kind.title()}!")
    (root / "words.csv").write_text("\n".join(lines) + "\n")
    return root


def test_pretrain_finetune_load_predict(world, tmp_path, tiny_config):
    pretrained, classifier, recognizer = (str(tmp_path / name) for name in ("pretrained", "classifier", "recognizer"))
    shared = [
        "--dataset_name",
        str(world),
        "--use_cpu",
        "true",
        "--dataloader_num_workers",
        "0",
        "--disable_tqdm",
        "true",
    ]
    shared += ["--batch_seconds", "20", "--logging_steps", "5"]
    run_pretrain.main(
        [*shared, "--output_dir", pretrained, "--max_steps", "10", "--config_overrides", json.dumps(tiny_config)]
        + ["--max_duration_in_seconds", "2", "--eval_steps", "5"]
    )
    tune = [
        *shared,
        "--model_name_or_path",
        pretrained,
        "--freeze_feature_encoder",
        "false",
        "--freeze_encoder_steps",
        "0",
    ]
    tune += [
        "--learning_rate",
        "3e-3",
        "--config_overrides",
        json.dumps({"mask_time_prob": 0.0, "mask_feature_prob": 0.0}),
    ]
    classified = run_finetune.main(
        [
            *tune,
            "--task",
            "classification",
            "--output_dir",
            classifier,
            "--max_steps",
            "30",
            "--test_split_name",
            "train",
        ]
    )
    assert classified["train_accuracy"] == 1.0
    run_finetune.main(
        [*tune, "--task", "ctc", "--train_split_name", "words", "--output_dir", recognizer, "--max_steps", "10"]
        + ["--test_split_name", "words"]
    )

    files = {path.name for path in (tmp_path / "pretrained").iterdir()}
    assert files >= {
        *("config.json", "model.safetensors", "preprocessor_config.json", "trainer_state.json", "all_results.json"),
        *("data_report.json", "run.json", "README.md", "figures"),
    }
    wav = str(world / "train" / "high" / "1.wav")
    result = subprocess.run(
        [sys.executable, "-c", PLAIN_TRANSFORMERS, pretrained, classifier, recognizer, wav],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "CLASS high" in result.stdout

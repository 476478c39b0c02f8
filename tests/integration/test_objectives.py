"""Every objective by the same commands: pretrain, stop, resume to the last bit, load, fine-tune."""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForPreTraining

import run_finetune
import run_pretrain
from acoustic.console import UserError
from acoustic.models import OBJECTIVES
from acoustic.training.trainer import AcousticTrainer

WAVE = {"conv_dim": [24] * 4, "conv_kernel": [10, 8, 8, 8], "conv_stride": [5, 4, 4, 4], "hidden_size": 24}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# Toy sizes, as `config_overrides`; wav2vec 2.0's is the fixture's.
SIZES = {
    "wav2vec": {**WAVE, "context_kernel": [2, 3]},
    "vq_wav2vec": {**WAVE, "context_kernel": [2, 3], "num_codevectors_per_group": 16},
    "cpc": {**WAVE, "num_negatives": 10},
    "mockingjay": {**BERT, "num_mel_bands": 20},
    "audio_albert": {**BERT, "num_mel_bands": 20},
    "code_bert": BERT,
}
STEPS, HALF = 30, 14


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two kinds of tone that switch on and off, each a word; a folder per kind and a manifest with the words."""
    root = tmp_path_factory.mktemp("world")
    generator = np.random.default_rng(0)
    lines = ["path,text"]
    for number in range(16):
        kind = ("low", "high")[number % 2]
        time = np.arange(24_000) / 16_000
        envelope = np.sin(2 * np.pi * generator.uniform(1.5, 2.5) * time) > 0
        tone = np.sin(2 * np.pi * (300 if kind == "low" else 2400) * generator.uniform(0.95, 1.05) * time) * envelope
        path = root / "train" / kind / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.3 * tone + 0.01 * generator.standard_normal(len(time)), 16_000)
        lines.append(f"train/{kind}/{number}.wav,{kind.title()}!")
    (root / "words.csv").write_text("\n".join(lines) + "\n")
    return root


def run(main, *options, **more) -> dict:
    given = {"use_cpu": "true", "dataloader_num_workers": 0, "disable_tqdm": "true", "report_to": "none", **more}
    argv = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    with contextlib.redirect_stdout(io.StringIO()):
        return main([*map(str, options), *argv])


def pretrain(world, output, objective, sizes, **more) -> dict:
    options = {"max_steps": STEPS, "learning_rate": 3e-3, "batch_seconds": 6}
    options |= {"max_duration_in_seconds": 1.5, "min_duration_in_seconds": 0.5}
    options |= {"save_steps": HALF, "eval_steps": STEPS, "logging_steps": 2, "validation_split_percentage": 20}
    options |= {"config_overrides": json.dumps(sizes), "objective": objective, "output_dir": output}
    return run(run_pretrain.main, dataset_name=Path(world, "train"), **{**options, **more})


@pytest.fixture(scope="module")
def pretrained(world, tmp_path_factory, tiny_config):
    """objective -> its output folder, made once."""
    made = {}

    def make(objective: str) -> Path:
        if objective not in made:
            output = tmp_path_factory.mktemp(objective) / "out"
            more = {"quantizer_name_or_path": make("vq_wav2vec")} if objective == "code_bert" else {}
            pretrain(world, output, objective, SIZES.get(objective, tiny_config), **more)
            made[objective] = output
        return made[objective]

    return make


def history(folder: Path) -> list[dict]:
    """What was logged, without the clock; and without the Trainer's mean of a run, which a resumed one begins anew."""
    clock = ("runtime", "seconds_per", "wait", "per_second", "flos")
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logged = [{k: v for k, v in entry.items() if not any(word in k for word in clock)} for entry in entries]
    return [entry for entry in logged if "train_loss" not in entry]


def test_codewords_by_k_means_have_no_temperature(world, tmp_path):
    sizes = {**SIZES["vq_wav2vec"], "quantizer_type": "kmeans"}
    with pytest.raises(UserError, match="gumbel_temperature_floor: quantizer_type 'kmeans' has no temperature"):
        pretrain(world, tmp_path / "out", "vq_wav2vec", sizes, gumbel_temperature_floor=1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_falls_and_what_is_saved_loads(objective, pretrained):
    folder = pretrained(objective)
    losses = [entry["loss"] for entry in history(folder) if "loss" in entry]
    assert all(map(math.isfinite, losses))
    assert np.mean(losses[-3:]) < np.mean(losses[:2])
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    audio = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    inputs = extractor(audio, sampling_rate=16_000, return_tensors="pt")
    frames = model(**inputs).last_hidden_state.shape[1]
    assert frames == model._get_feat_extract_output_lengths(16_000)
    assert abs(frames - 16_000 / model.config.inputs_to_logits_ratio) < 4
    again = AutoModelForPreTraining.from_pretrained(folder)
    assert again.config.model_type == objective
    assert {path.name for path in (folder / "figures").glob("*.png")} > {
        "pretraining.png"
    } or objective == "mockingjay"
    assert "## Health" in (folder / "README.md").read_text()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_is_the_same_to_the_last_bit(objective, pretrained, world, tmp_path, tiny_config):
    """Stopped as if the run had been asked for HALF of its updates, then asked for all of them."""
    whole, half = pretrained(objective), tmp_path / "half"
    more = {"quantizer_name_or_path": pretrained("vq_wav2vec")} if objective == "code_bert" else {}
    sizes = SIZES.get(objective, tiny_config)
    # The schedule is that of all updates: the run is left by an error after its checkpoint.
    leave = LeaveAfter(HALF)
    with pytest.raises(leave.Left), leave:
        pretrain(world, half, objective, sizes, **more)
    pretrain(world, half, objective, sizes, resume_from_checkpoint="true", **more)
    assert history(half) == history(whole)
    weights = [load_file(folder / "model.safetensors") for folder in (half, whole)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


class LeaveAfter:
    """Ends the run in the middle of the update after a checkpoint."""

    class Left(Exception):
        pass

    def __init__(self, update: int):
        self.update = update

    def __enter__(self):
        self.step = AcousticTrainer.training_step
        given = self

        def training_step(trainer, *args, **kwargs):
            if trainer.state.global_step == given.update:
                raise given.Left
            return given.step(trainer, *args, **kwargs)

        AcousticTrainer.training_step = training_step

    def __exit__(self, *error):
        AcousticTrainer.training_step = self.step


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("task", ["classification", "ctc"])
def test_fine_tuning(objective, task, pretrained, world, tmp_path):
    data = world if task == "classification" else world / "words.csv"
    options = {"task": task, "dataset_name": data, "model_name_or_path": pretrained(objective), "max_steps": 4}
    options |= {"output_dir": tmp_path / "out", "batch_seconds": 20, "logging_steps": 1, "freeze_encoder_steps": 2}
    options |= {"test_split_name": "train"} if task == "classification" else {}
    results = run(run_finetune.main, **options)
    assert math.isfinite(results["train_loss"])
    if task == "classification":
        assert 0 <= results["train_accuracy"] <= 1
    assert (tmp_path / "out" / "README.md").is_file()


def test_another_family_is_refused(pretrained, world, tmp_path):
    with pytest.raises(UserError, match="is a cpc checkpoint, which objective mockingjay can't continue"):
        pretrain(world, tmp_path, "mockingjay", {}, model_name_or_path=pretrained("cpc"))


def test_resuming_with_another_objective_is_refused(pretrained, world):
    folder = pretrained("cpc")
    with pytest.raises(UserError, match="is of a cpc model, and this run trains mockingjay"):
        pretrain(world, folder, "mockingjay", SIZES["mockingjay"], resume_from_checkpoint="true", max_steps=STEPS + 5)


@pytest.mark.parametrize(
    "objective, options, message",
    [
        ("wav2vec", {"min_duration_in_seconds": 0.1}, "min_duration_in_seconds: in 0.1 s there is nothing"),
        ("wav2vec", {"min_duration_in_seconds": 0.02}, "min_duration_in_seconds: at least 0.1 s"),
        ("cpc", {"config_overrides": '{"offset": 200}'}, "max_duration_in_seconds: in 1.5 s there is nothing"),
        ("cpc", {"gradient_checkpointing": "true"}, "gradient_checkpointing: a cpc model has no layers"),
        ("mockingjay", {"config_overrides": '{"sampling_rate": 11025}'}, "not a whole number"),
        ("code_bert", {"quantizer_name_or_path": "nowhere"}, "quantizer_name_or_path: no model 'nowhere'"),
    ],
)
def test_bad_input_before_any_audio_is_read(objective, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        pretrain("nothing is there", tmp_path, objective, {}, **options)

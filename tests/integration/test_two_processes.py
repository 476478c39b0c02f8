"""Two processes over gloo, started once: each sees audio of its own, and together they compute what one would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stock import draw
from two_processes import train_on

from acoustic.models.wav2vec2 import Wav2Vec2ForPreTraining
from acoustic.report.record import read_json

ROOT = Path(__file__).parents[2]
UPDATES = 3


def words(**options) -> list[str]:
    shared = {
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "batch_seconds": 3,
        "max_duration_in_seconds": 2,
        **options,
    }
    pairs = [[f"--{key}", *(value if isinstance(value, list) else [str(value)])] for key, value in shared.items()]
    return [word for pair in pairs for word in pair]


def make_batches(checkpoint: str) -> tuple[list[list[dict]], list[dict]]:
    """(for each process its batches of two windows, for one process batches of the same four windows).

    The second process has many more masked frames than the first.
    """
    model = Wav2Vec2ForPreTraining.from_pretrained(checkpoint)
    frames = int(model._get_feat_extract_output_lengths(16000))
    generator, apart, together = torch.Generator().manual_seed(0), ([], []), []
    for _ in range(UPDATES):
        audio = torch.randn(4, 16000, generator=generator)
        drawn = [draw(2, frames, prob, generator) for prob in (0.1, 0.8)]
        masks, negatives = zip(*(targets.values() for targets in drawn))
        assert masks[1].sum() > 2 * masks[0].sum()
        for process, targets in enumerate(drawn):
            apart[process].append({"input_values": audio[2 * process : 2 * process + 2], **targets})
        moved = (negatives[1] + 2 * frames) * masks[1][..., None]
        together.append(
            {
                "input_values": audio,
                "mask_time_indices": torch.cat(masks),
                "sampled_negative_indices": torch.cat([negatives[0], moved]),
            }
        )
    return list(apart), together


@pytest.fixture(scope="module")
def launched(tmp_path_factory, audio_file, tiny_config, group_norm_checkpoint):
    """(the folder, run -> what each of the two processes saw); one launch, for starting is what takes long."""
    folder = tmp_path_factory.mktemp("two_processes")
    for index in range(20):
        audio_file(folder / "unlabeled" / f"{index:02d}.wav", 1.0 + 0.1 * index, seed=index)
    for split, count in (("train", 6), ("eval", 9), ("test", 2), ("lone", 1)):
        for label in ("a", "b")[: 1 if split == "lone" else 2]:
            for index in range(count):
                seconds, seed = 0.3 + 0.05 * index, index + 100 * (label == "b")
                audio_file(folder / "labeled" / split / label / f"{index}.wav", seconds, seed=seed)
    (folder / "broken").mkdir()
    for index in range(3):
        (folder / "broken" / f"{index}.wav").write_text("no audio")
    apart, together = make_batches(group_norm_checkpoint)
    torch.save({"batches": apart, "checkpoint": group_norm_checkpoint}, folder / "batches.pt")
    torch.save(together, folder / "together.pt")
    # Half of the layers left out, so that within a few updates every combination occurs.
    overrides = json.dumps({**tiny_config, "layerdrop": 0.5})
    pretrain = {
        "dataset_name": folder / "unlabeled",
        "config_overrides": overrides,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "eval_steps": 3,
        "save_steps": 4,
        "validation_split_percentage": 20,
    }
    argv = {
        "pretrain": words(**pretrain, output_dir=folder / "pretrained"),
        "resumed": words(
            **pretrain,
            output_dir=folder / "resumed",
            resume_from_checkpoint=folder / "pretrained" / "checkpoint-4",
        ),
        "short_of_memory": words(**pretrain, output_dir=folder / "short_of_memory"),
        "stopped": words(**pretrain, output_dir=folder / "stopped", on_collapse="stop"),
        "compiled": words(
            **{**pretrain, "config_overrides": json.dumps({**tiny_config, "layerdrop": 0.1}), "max_steps": 4},
            torch_compile_backend="eager",  # what differs between processes is the tracing
            output_dir=folder / "compiled",
        ),
        "finetune": words(
            dataset_name=folder / "labeled",
            model_name_or_path=group_norm_checkpoint,
            output_dir=folder / "finetuned",
            config_overrides='{"layerdrop": 0.5}',
            task="classification",
            learning_rate=1e-3,
            freeze_encoder_steps=2,
            max_steps=5,
            eval_steps=5,
            eval_split_name="eval",
            test_split_name=["eval", "test", "lone"],
        ),
        "mistaken": words(
            **{**pretrain, "dataset_name": folder / "broken", "validation_split_percentage": 0},
            output_dir=folder / "mistaken",
        ),
    }
    (folder / "argv.json").write_text(json.dumps(argv))
    # What `accelerate launch` starts for several processes; its `--cpu --num_processes 2` would start a single one.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, ROOT / "tests/integration/two_processes.py", folder],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return folder, lambda run: [torch.load(folder / f"{run}_{rank}.pt") for rank in range(2)]


def logged(run: dict, name: str) -> list[float]:
    return [entry[name] for entry in run["history"] if "loss" in entry]


def test_two_processes_compute_the_update_of_one(launched, group_norm_checkpoint, tmp_path):
    folder, runs = launched
    one = train_on(torch.load(folder / "together.pt"), group_norm_checkpoint, str(tmp_path))
    for two in runs("given"):
        for name in ("loss", "contrastive_loss", "accuracy", "masked_fraction", "grad_norm"):
            assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-4), name
        start = Wav2Vec2ForPreTraining.from_pretrained(group_norm_checkpoint).state_dict()
        moved = sum((one["weights"][name] - start[name]).square().sum() for name in start) ** 0.5
        apart = sum((one["weights"][name] - two["weights"][name]).square().sum() for name in start) ** 0.5
        assert apart < 1e-4 * moved


def test_each_process_hears_audio_of_its_own(launched):
    first, second = (set(run["windows"]["train"]) for run in launched[1]("pretrain"))
    assert len(first) >= 5 and len(second) >= 5
    # Shards are dealt anew every epoch, so only windows of the same epoch must differ: here the first.
    size = min(len(first), len(second))
    lists = [run["windows"]["train"][: size // 2] for run in launched[1]("pretrain")]
    assert not set(lists[0]) & set(lists[1])


@pytest.mark.parametrize("run", ["pretrain", "short_of_memory", "compiled", "finetune"])
def test_weights_are_the_same_on_both_after_every_update(launched, run):
    """Layers that one process drops, a frozen encoder and its release included."""
    first, second = launched[1](run)
    assert len(first["updates"]) == {"pretrain": 7, "short_of_memory": 7, "compiled": 5, "finetune": 6}[run]
    assert first["updates"] == second["updates"]


def test_pretraining_moves_and_logs(launched):
    first, second = launched[1]("pretrain")
    # The learning rate of the first update is 0: warmup.
    for old, new in zip(first["updates"][1:], first["updates"][2:]):
        assert old["wav2vec2.encoder"] != new["wav2vec2.encoder"]
    assert logged(first, "loss") == logged(second, "loss")
    assert first["results"]["eval_contrastive_loss"] == second["results"]["eval_contrastive_loss"]


def test_a_batch_that_one_process_has_no_room_for_holds_up_none(launched):
    """It is left out there, and the update is made of the other batches."""
    plain, short = (launched[1](run)[0]["updates"] for run in ("pretrain", "short_of_memory"))
    assert short[:3] == plain[:3]
    assert short[3] != plain[3] and short[4] != short[3]


def test_a_run_that_stops_itself_leaves_together_after_its_report(launched):
    """A launcher ends the first process, which writes the report, as soon as the second is gone."""
    first, second = launched[1]("stopped")
    assert first["error"] == second["error"] == "stopped at update 2: a collapse"
    written = (launched[0] / "stopped" / "all_results.json").stat().st_mtime
    assert written <= min(first["at"], second["at"])


def test_compiled_with_layerdrop_it_trains_on_few_graphs(launched):
    for run in launched[1]("compiled"):
        assert len(logged(run, "loss")) == 4
        # The layers share one graph and the loss has one, each with fixed and with free sizes, trained and evaluated.
        assert 2 <= logged(run, "compiled_graphs")[-1] <= 10


def test_a_resumed_run_of_two_equals_the_uninterrupted_one(launched):
    """Each from its own place in the audio and its own random numbers, to the last bit."""
    for whole, resumed in zip(launched[1]("pretrain"), launched[1]("resumed")):
        for name in ("loss", "accuracy", "grad_norm", "hours_seen", "epoch"):
            assert logged(resumed, name) == logged(whole, name), name
        assert resumed["updates"] == whole["updates"][4:]
        heard = resumed["windows"]["train"]
        assert heard == whole["windows"]["train"][-len(heard) :]


def test_the_held_out_part_is_evaluated_once_by_both_together(launched):
    """Two evaluations while training; the end tells what the last of them said."""
    both = [run["windows"]["evaluation"] for run in launched[1]("pretrain")]
    assert both[0] and both[1]
    assert not set(both[0]) & set(both[1])
    assert {(both[0] + both[1]).count(window) for window in set(both[0] + both[1])} == {2}


def test_the_encoder_is_frozen_then_released(launched):
    first, _ = launched[1]("finetune")
    changed = [
        {part for part in old if old[part] != new[part]} for old, new in zip(first["updates"], first["updates"][1:])
    ]
    assert ["wav2vec2.encoder" in parts for parts in changed] == [False, False, True, True, True]
    assert all("classifier.weight" in parts for parts in changed)
    assert not any("wav2vec2.feature_extractor" in parts for parts in changed)


@pytest.mark.parametrize(("split", "count"), [("eval", 18), ("test", 4), ("lone", 1)])
def test_every_clip_is_scored_exactly_once(launched, split, count):
    """Of 18 clips each process scores whole recordings, of 4 every other window, and of one the second has none."""
    folder, runs = launched
    names = [item["name"] for item in read_json(folder / "finetuned" / f"predictions_{split}.json")["predictions"]]
    assert len(names) == len(set(names)) == count
    first, second = runs("finetune")
    assert first["results"][f"{split}_accuracy"] == second["results"][f"{split}_accuracy"]
    assert first["results"][f"{split}_loss"] == second["results"][f"{split}_loss"]


def test_a_mistake_ends_both_processes_with_one_line(launched):
    """The first looks at the audio for both; the second does not wait for it."""
    both = launched[1]("mistaken")
    assert [run["code"] for run in both] == [2, 2]
    lines = [line for run in both for line in run["said"].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "can be used: 3 x not readable as audio" in lines[0]

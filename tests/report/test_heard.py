"""What the model hears is shown and can be listened to, with what was hidden from it left out; also in a live view."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from transformers import AutoModelForPreTraining

from acoustic.models.mockingjay import MockingjayConfig
from acoustic.models.registry import OBJECTIVES
from acoustic.report.heard import Example, ShowHeard, draw_heard, examples_of, sounds

pytestmark = pytest.mark.figures

RATE = 16_000


def tone(seconds: float) -> np.ndarray:
    return np.sin(2 * np.pi * 440 * np.arange(int(seconds * RATE)) / RATE)


def test_hidden_spans_are_silent_and_the_rest_is_not():
    hidden = np.array([0, 1, 1, 0, 0, 0, 0, 0, 0, 1], bool)
    example = Example(tone(1.0), RATE, hidden)
    assert example.spans == [(pytest.approx(0.1), pytest.approx(0.3)), (pytest.approx(0.9), pytest.approx(1.0))]
    silent = example.sound_without_hidden
    assert not silent[1600:4800].any() and not silent[14_400:].any()
    np.testing.assert_array_equal(silent[4800:14_400], example.sound[4800:14_400])
    assert np.abs(example.sound).max() == pytest.approx(0.7)


def test_a_long_window_is_cut_and_its_spans_with_it():
    example = Example(tone(24.0), RATE, np.arange(100) >= 25)
    assert example.seconds == 12 and example.spans == [(pytest.approx(6.0), pytest.approx(12.0))]


def test_what_is_hidden_is_what_training_hides(layer_norm_checkpoint):
    """For wav2vec 2.0 the same frames as the loss is about; about as many for a reconstruction."""
    model = OBJECTIVES["wav2vec2"].from_pretrained(layer_norm_checkpoint)
    audio = torch.randn(4, RATE)
    found = examples_of(model, audio, RATE, seed=3)
    assert len(found) == 3
    for example, mask in zip(found, model.draw_targets(3, RATE, 3).mask):
        np.testing.assert_array_equal(example.hidden, mask.numpy())
    config = MockingjayConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = AutoModelForPreTraining.from_config(config)
    corruption = model.draw_corruption(2, model.count_frames(RATE), 5)
    mask = model.draw_mask(2, RATE, 5)
    assert mask.sum() == corruption.places.numel() and mask.gather(1, corruption.places).all()


def test_the_figure_marks_what_is_hidden(tmp_path):
    drawn = []
    for name, hidden in (("nothing", np.zeros(50, bool)), ("half", np.arange(50) < 25)):
        path = draw_heard(str(tmp_path / name), [Example(tone(1.0), RATE, hidden), Example(tone(1.0), RATE, hidden)])
        drawn.append(plt.imread(path)[..., :3])
    assert drawn[0].shape == drawn[1].shape and np.abs(drawn[0] - drawn[1]).mean() > 0.01
    draw_heard(str(tmp_path), [Example(tone(1.0), RATE, None)])
    assert not plt.get_fignums()


class Client:
    """What trackio and wandb have in common."""

    def __init__(self):
        self.logged = []

    def log(self, values):
        self.logged.append(values)

    def Image(self, path):
        return ("image", path)

    def Audio(self, sound, sample_rate):
        return ("audio", len(sound), sample_rate)


class TrackioCallback:
    def __init__(self):
        self._trackio = Client()


class TensorBoardCallback:
    def __init__(self):
        self.tb_writer = SimpleNamespace(add_image=self.add, add_audio=self.add)
        self.added = []

    def add(self, name, value, update, **options):
        self.added.append((name, tuple(value.shape), update))


@pytest.fixture
def run(tmp_path):
    """run(callbacks) -> what ends an update: (step)."""

    def make(callbacks: list):
        model = SimpleNamespace(draw_mask=lambda batch, samples, seed: torch.arange(10).expand(batch, 10) < 5)
        trainer = SimpleNamespace(
            example=torch.randn(2, RATE),
            model=model,
            is_fsdp_enabled=False,
            train_dataset=SimpleNamespace(rate=RATE),
            callback_handler=SimpleNamespace(callbacks=callbacks),
        )
        callback = ShowHeard(trainer)
        args = SimpleNamespace(device="cpu", output_dir=str(tmp_path), seed=1)
        return lambda step: callback.on_step_end(
            args, SimpleNamespace(is_world_process_zero=True, global_step=step), None
        )

    return make


def test_it_is_shown_once_where_the_run_is_watched(run, tmp_path):
    trackio, board = TrackioCallback(), TensorBoardCallback()
    step = run([trackio, object(), board])
    step(7)
    step(8)
    (logged,) = trackio._trackio.logged
    assert logged["heard"] == ("image", tmp_path / "figures" / "heard.png") or logged["heard"][1].endswith("heard.png")
    assert logged["train/global_step"] == 7
    names = set(sounds(examples_of(SimpleNamespace(), torch.randn(2, RATE), RATE, 0)))
    assert names == {"heard/1", "heard/2"} and names < set(logged)
    assert logged["heard/1_without_what_is_hidden"] == ("audio", RATE, RATE)
    assert [name for name, _, _ in board.added] == ["heard", *(name for name in logged if name.startswith("heard/"))]
    assert all(update == 7 for _, _, update in board.added)


def test_without_a_live_view_nothing_is_drawn(run, tmp_path):
    run([object()])(1)
    assert not (tmp_path / "figures").exists()


def test_a_tracker_that_fails_costs_a_warning(run, capsys):
    class WandbCallback:
        _wandb = None

    run([WandbCallback()])(1)
    assert "warning: the live view takes no audio or pictures (AttributeError" in capsys.readouterr().out

"""The benchmark of the pretraining step at a toy size: its FLOP count, its stock side, its tables, one whole run."""

import json

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import pretrain_step
from benchmarks.pretrain_step import (
    CONFIGS,
    RATE,
    Batch,
    Case,
    draw_like_stock,
    forward_flops,
    pad,
    ratios,
    representative,
    summarise,
    table,
)

CASE = Case("tiny", "fixed", "float32", "off", 0.0, 15.6, "cpu")
LAYER_NORM = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}


@pytest.fixture
def in_process(monkeypatch):
    """No new processes, which only cost the imports again, and malloc as it is."""
    monkeypatch.setattr(pretrain_step, "fresh", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(pretrain_step, "keep_memory", lambda: None)


@pytest.fixture
def few_clips(monkeypatch, tmp_path):
    """Durations in seconds; the first is too short, the last is cut."""
    durations = [0.3, 0.6, 0.7, 0.9, 1.2, 1.3, 2.0, 2.4, 3.1, 17.0]
    (tmp_path / "durations.json").write_text(json.dumps(durations))
    monkeypatch.setattr(pretrain_step, "DURATIONS", tmp_path / "durations.json")
    return durations


def tiny(**changes):
    config = transformers.Wav2Vec2Config(**{**CONFIGS["tiny"], **changes})
    return transformers.Wav2Vec2ForPreTraining(config)


@pytest.mark.parametrize("changes", [{}, LAYER_NORM, {"num_hidden_layers": 4, "intermediate_size": 200}])
def test_flops_are_those_that_torch_counts(changes):
    config = transformers.Wav2Vec2Config(**{**CONFIGS["tiny"], **changes}, attn_implementation="eager")
    model = transformers.Wav2Vec2Model(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(2, 2 * RATE))
    assert 2 * forward_flops(config, 2 * RATE) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_training_step_is_about_three_forward_passes():
    model = tiny(attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        batch = pad([np.random.default_rng(0).standard_normal(2 * RATE)], model.config)
        pretrain_step.stock_loss(model, batch, "cpu", 0).backward()
    # The head, which is left out, is a few percent of so small a model; so is the first conv's absent input gradient.
    assert 3 * forward_flops(model.config, 2 * RATE) == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("changes", [{}, LAYER_NORM])
def test_stock_pads_to_the_longest_with_an_attention_mask_for_layer_norm_only(changes):
    generator, config = np.random.default_rng(0), tiny(**changes).config
    batch = pad([3 + generator.standard_normal(length) for length in (9600, RATE, 8000)], config)
    assert batch.input_values.shape == (3, RATE) and batch.lengths == [9600, RATE, 8000]
    assert batch.seconds == (pytest.approx(2.1), pytest.approx(0.9))
    assert not batch.input_values[0, 9600:].any() and abs(float(batch.input_values[0, :9600].mean())) < 1e-4
    if changes:
        assert batch.attention_mask.sum(1).tolist() == batch.lengths
    else:
        assert batch.attention_mask is None


def test_stock_masks_nothing_that_is_not_there():
    model = tiny(**LAYER_NORM)
    batch = pad([np.random.default_rng(0).standard_normal(length) for length in (9600, 2 * RATE)], model.config)
    np.random.seed(0)
    frames = int(model._get_feat_extract_output_lengths(9600))
    for _ in range(20):
        drawn = draw_like_stock(model, batch)
        mask, negatives = drawn["mask_time_indices"], drawn["sampled_negative_indices"]
        assert mask.shape == (2, 99) and negatives.shape == (2, 99, 10)
        assert mask[0].any() and not mask[0, frames:].any()
        for row in range(2):
            places = 99 * row + mask[row].nonzero().squeeze(1)
            assert torch.isin(negatives[row][mask[row]], places).all()
            assert (negatives[row][mask[row]] != places[:, None]).all()


def test_the_sides_differ_in_nothing_but_the_model(in_process):
    stock, ours = (pretrain_step.Trainer(CASE, side, seed=3) for side in ("stock", "ours"))
    weights = ours.plain.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in stock.plain.state_dict().items())
    assert stock.optimizer.defaults == ours.optimizer.defaults
    drawn = draw_like_stock(stock.plain, batch := pretrain_step.fixed_batch(1, CASE.config(), 0))
    losses = [trainer.plain.eval()(batch.input_values, **drawn).loss for trainer in (stock, ours)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-3)


def test_the_chosen_batches_are_like_all():
    generator = np.random.default_rng(0)
    seconds = [(float(audio), float(audio * share)) for audio, share in generator.uniform(1, 9, (200, 2))]
    chosen = representative(seconds, 4, seed=0)
    assert len(set(chosen)) == 4
    assert np.mean([seconds[index] for index in chosen], 0) == pytest.approx(np.mean(seconds, 0), rel=0.1)
    assert representative([(1.0, 0.0)], 3, seed=0) == [0, 0, 0]


def test_both_sides_get_the_same_audio(few_clips, tmp_path):
    args = pretrain_step.parse(["--size", "tiny", "--steps", "2", "--batch_seconds", "16", "--device", "cpu"])
    case = pretrain_step.cases(args)[0]
    epochs = pretrain_step.prepare_batches(case, args, tmp_path / "work")
    assert epochs["ours"]["mean_padded_seconds"] == 0 < epochs["stock"]["mean_padded_seconds"]
    for side in ("stock", "ours"):
        batches = pretrain_step.load_batches(tmp_path / "work" / side, "cpu")
        assert len(batches) == 2 and all(isinstance(batch, Batch) for batch in batches)
        assert all(len(batch.input_values) == len(batch.lengths) for batch in batches)
        assert all(0.5 * RATE <= length <= 15.6 * RATE for batch in batches for length in batch.lengths)


def process(seconds: list[float], peak: float) -> dict:
    """What one process reports."""
    spans = [{"seconds": s, "steps": 1, "audio": 10.0, "padded": 5.0, "flops": 4e9} for s in seconds]
    about = {"before_bytes": 1e9, "peak_bytes": peak, "warm_up_seconds": 2.0, "graphs": 0, "late_graphs": 0}
    return {"spans": spans, "matmul_flops": 1e10, **about}


def test_numbers_are_medians_over_processes_and_sums_over_spans():
    numbers = summarise([process([1.0, 3.0], 3e9), process([9.0, 3.0], 2e9), process([1.0, 3.0], 2e9)])
    assert numbers["seconds_per_step"] == 2 and numbers["audio_seconds_per_second"] == 5
    assert numbers["padded_seconds_per_step"] == 5 and numbers["flop_utilisation"] == 0.2
    assert (numbers["peak_gb"], numbers["before_gb"], numbers["step_gb"]) == (3, 1, 2)


def test_a_table_is_aligned_and_ends_with_the_ratios():
    stock, ours = summarise([process([4.0], 4e9)]), summarise([process([2.0], 2e9)])
    entry = {"case": CASE._asdict(), "stock": stock, "ours": ours, "ratios": ratios(stock, ours)}
    failed = {"failed": "CUDA out of memory"}
    other = {
        "case": CASE._replace(size="large")._asdict(),
        "stock": failed,
        "ours": ours,
        "ratios": ratios(failed, ours),
    }
    lines = table([entry, other]).splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    assert "5.0" in lines[2] and "20.0%" in lines[2] and lines[3].split()[-1] == "-"
    assert lines[5].endswith(
        "audio-seconds per second 2.00, peak memory 0.50, memory above weights and optimizer 0.33"
    )
    assert lines[6].endswith("stock failed: CUDA out of memory") and len(lines) == 7


def test_a_case_measured_again_replaces_itself(tmp_path):
    output = tmp_path / "results" / "numbers.json"
    other = {**CASE._asdict(), "size": "base"}
    for entry in ({"case": CASE._asdict(), "n": 1}, {"case": other, "n": 2}, {"case": CASE._asdict(), "n": 3}):
        pretrain_step.write_case(output, entry)
    assert [entry["n"] for entry in json.loads(output.read_text())["cases"]] == [2, 3]


def test_a_whole_run_writes_what_it_measured(in_process, few_clips, tmp_path, capsys):
    output = tmp_path / "numbers.json"
    options = ["--size", "tiny", "--steps", "1", "--repeats", "1", "--batch_seconds", "16", "--device", "cpu"]
    pretrain_step.main([*options, "--output", str(output)])
    entries = json.loads(output.read_text())["cases"]
    assert [entry["case"]["lengths"] for entry in entries] == ["voice_prompts", "fixed"]
    for entry in entries:
        assert {"command", "commit", "date", "seed", "versions", "hardware"} <= set(entry["about"])
        for side in ("stock", "ours"):
            assert entry[side]["audio_seconds_per_second"] > 0 and 0 < entry[side]["flop_utilisation"] < 2
            assert entry[side]["peak_gb"] > 0
        assert entry["ratios"]["audio_seconds_per_second"] > 0
    assert entries[1]["stock"]["audio_seconds_per_step"] == 15.6 == entries[1]["ours"]["audio_seconds_per_step"]
    assert "ours / stock" in capsys.readouterr().out


def test_a_side_that_fails_is_said_and_the_other_measured(in_process, monkeypatch, tmp_path):
    monkeypatch.setitem(pretrain_step.SIDES, "stock", lambda config: (_ for _ in ()).throw(RuntimeError("no memory")))
    options = ["--size", "tiny", "--lengths", "fixed", "--steps", "1", "--batch_seconds", "15.6", "--device", "cpu"]
    (entry,) = pretrain_step.main([*options, "--repeats", "1", "--output", str(tmp_path / "numbers.json")])
    assert entry["stock"]["failed"] == "no memory" and entry["ours"]["seconds_per_step"] > 0 and not entry["ratios"]


@pytest.mark.figures
def test_curves_of_equal_weights_begin_alike(in_process, few_clips, monkeypatch, tmp_path):
    folder = tmp_path / "clips"
    pretrain_step.write_clips(folder, few_clips, seed=0)
    monkeypatch.setattr(pretrain_step, "curve_audio", lambda work: (str(folder),))
    pretrain_step.main(
        ["--curve", "2", "--batch_seconds", "8", "--device", "cpu", "--output", str(tmp_path / "n.json")]
    )
    content = json.loads((tmp_path / "pretrain_curve.json").read_text())
    assert {len(losses) for losses in content["curves"].values()} == {2}
    first = [losses[0] for losses in content["curves"].values()]
    assert max(first) - min(first) < 0.1 * min(first)
    assert (tmp_path / "pretrain_curve.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "options, words",
    [
        (["--size", "huge"], "invalid choice"),
        (["--steps", "0"], "must be from 1"),
        (["--largest_batch", "--device", "cpu"], "only on a GPU"),
        (["--attention_dropout", "2"], "must be from 0 to 0.99"),
    ],
)
def test_a_bad_option_is_one_line(options, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        pretrain_step.main(options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1


# ---- the README

ROOT = pretrain_step.ROOT


ROWS = {
    ("voice_prompts", "float32", "off"): "lengths of the voice prompts, 20 s of audio in a batch",
    ("fixed", "float32", "off"): "two windows of 15.6 s, no dropout in the attention",
    ("voice_prompts", "bfloat16", "off"): "lengths of the voice prompts, bfloat16",
    ("fixed", "bfloat16", "off"): "two windows of 15.6 s, bfloat16",
    ("fixed", "float32", "on"): "two windows of 15.6 s, compiled",
}


def measured(lengths: str, precision: str, compiled: str) -> dict:
    """The committed case of base size on a CPU; of several batches the one of the smallest."""
    content = json.loads((ROOT / "benchmarks/results/pretrain_step_cpu.json").read_text())
    wanted = {"size": "base", "lengths": lengths, "precision": precision, "compile": compiled, "device": "cpu"}
    found = [case for case in content["cases"] if wanted.items() <= case["case"].items()]
    return min(found, key=lambda case: case["case"]["batch_seconds"])


@pytest.mark.parametrize("key", ROWS)
def test_the_readme_has_the_committed_numbers(key):
    case = measured(*key)
    ours, stock, ratios = case["ours"], case["stock"], case["ratios"]
    row = (
        f"| {ROWS[key]} | **{ours['audio_seconds_per_second']:.2f}** | {stock['audio_seconds_per_second']:.2f} | "
        f"**{ratios['audio_seconds_per_second']:.1f} x** | {ours['peak_gb']:.1f} / {stock['peak_gb']:.1f} GB |"
    )
    assert row in (ROOT / "README.md").read_text()


def test_the_readme_says_what_the_numbers_mean():
    """Hours of audio in an hour, and the paper's 640,000 hours at that rate."""
    rate = measured("voice_prompts", "float32", "off")["ours"]["audio_seconds_per_second"]
    half = measured("fixed", "bfloat16", "off")["ours"]["audio_seconds_per_second"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"{rate:.1f} to {half:.1f} hours of audio in an hour" in text
    assert f"{640_000 / half / 24 / 365.25:.0f} years" in text

"""The demo's sound world: each machine sounds as its timeline says, and the files are as promised.

Tones are looked for on the axis of orders (multiples of the shaft rate): the waveform is resampled at equal steps of
the angle that the timeline tells, so a peak there proves physics and timeline at once, load changes included.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

DEMO = Path(__file__).resolve().parents[1] / "recipes" / "demo"
sys.path.insert(0, str(DEMO))

import sound_world  # noqa: E402
import synthesize  # noqa: E402

RATE = sound_world.SAMPLE_RATE
INDIVIDUALS = 8
CLIP_SECONDS = 20.0
SMALL = ["--hours", "0.01", "--labeled_per_class", "2", "--test_per_class", "1", "--recording_seconds", "6"]
SMALL += ["--clip_seconds", "1"]


@functools.cache
def clips(component, shifted=False):
    """INDIVIDUALS clips of CLIP_SECONDS, about a hundred turns of a slow shaft: [(waveform, event), ...]."""
    draws = [np.random.default_rng([7, sound_world.COMPONENTS.index(component), k]) for k in range(INDIVIDUALS)]
    made = [sound_world.synthesize_clip(component, rng, CLIP_SECONDS, shifted) for rng in draws]
    return [(waveform, timeline["events"][0]) for waveform, timeline in made]


def switched_on(event):
    """The phases in which the machine has power and has run up."""
    return [phase for phase in event["phases"] if phase["kind"] in ("steady", "load_change")]


def order_spectrum(signal, event, steps_per_turn):
    """Orders (bins,) and power (bins,) of a signal at RATE, resampled at equal angles while the machine is on."""
    start, end = switched_on(event)[0]["start"], switched_on(event)[-1]["end"]
    times = np.arange(int(start * RATE), int(end * RATE)) / RATE
    turns = np.cumsum(sound_world.lagged_curve(event, "speed_hz", times)) / RATE
    angles = np.arange(turns[0], turns[-1], 1 / steps_per_turn)
    at_angles = np.interp(np.interp(angles, turns, times), np.arange(len(signal)) / RATE, signal)
    power = np.abs(np.fft.rfft((at_angles - at_angles.mean()) * np.hanning(len(angles)))) ** 2
    return np.fft.rfftfreq(len(angles), 1 / steps_per_turn), power


def prominence(orders, power, order, halfwidth=0.012, around=0.35):
    """Decibels by which the strongest bin within +-1.2 % of `order` exceeds the median of +-35 %."""
    near = np.abs(orders / order - 1) < halfwidth
    surround = np.abs(orders / order - 1) < around
    return 10 * np.log10(power[near].max() / np.median(power[surround]))


def envelope(waveform, low, high):
    """Magnitude (samples,) of the analytic signal of one band."""
    spectrum, frequencies = np.fft.fft(waveform), np.fft.fftfreq(len(waveform), 1 / RATE)
    return np.abs(np.fft.ifft(2 * spectrum * ((frequencies > low) & (frequencies < high))))


def tone_order(event):
    """Order of the tone that names the component."""
    geometry = event["geometry"]
    return geometry.get("blades") or geometry.get("vanes") or geometry.get("teeth")


def count_above(values, decibels):
    return sum(value > decibels for value in values)


@pytest.mark.parametrize("component", ["fan", "pump", "gear"])
def test_the_passing_tone_is_where_geometry_and_speed_say(component):
    right, wrong = [], []
    for waveform, event in clips(component):
        orders, power = order_spectrum(waveform, event, 2048)
        right.append(prominence(orders, power, tone_order(event)))
        wrong.append(prominence(orders, power, tone_order(event) + 0.5))  # no shaft-rate multiple either
    assert count_above(right, 20) >= INDIVIDUALS - 1, right
    assert np.median(right) > np.median(wrong) + 8, (right, wrong)


def test_fan_turbulence_swells_with_the_blades():
    margins = []
    for waveform, event in clips("fan"):
        orders, power = order_spectrum(envelope(waveform, 4500, 7800), event, 1024)
        margins.append(prominence(orders, power, tone_order(event)))
    assert count_above(margins, 10) >= INDIVIDUALS - 1, margins


def test_gear_mesh_has_sidebands_at_both_shaft_rates():
    for distance_of in (lambda g: 1.0, lambda g: g["teeth"] / g["wheel_teeth"]):
        margins = []
        for waveform, event in clips("gear"):
            orders, power = order_spectrum(waveform, event, 2048)
            distance, mesh = distance_of(event["geometry"]), tone_order(event)
            sides = [power[np.abs(orders - mesh - sign * distance) < 0.06].max() for sign in (-1, 1)]
            between = np.median(power[np.abs(orders - mesh) < 3])
            margins.append(10 * np.log10(np.mean(sides) / between))
        assert count_above(margins, 10) >= INDIVIDUALS - 1, margins


def test_motor_hums_at_twice_the_line_frequency():
    margins = []
    for waveform, event in clips("motor"):
        geometry = event["geometry"]
        if geometry["on_inverter"]:  # the line follows the shaft
            axis, power = order_spectrum(waveform, event, 2048)
            hum = 2 * geometry["pole_pairs"] / (1 - geometry["slip"])
        else:  # the line stays, whatever the shaft does
            start, end = switched_on(event)[0]["start"], switched_on(event)[-1]["end"]
            part = waveform[int(start * RATE) : int(end * RATE)]
            axis, power = np.fft.rfftfreq(len(part), 1 / RATE), np.abs(np.fft.rfft(part * np.hanning(len(part)))) ** 2
            hum = 2 * geometry["line_hz"]
        margins.append(prominence(axis, power, hum))
    assert {event["geometry"]["on_inverter"] for _, event in clips("motor")} == {True, False}
    assert count_above(margins, 20) >= INDIVIDUALS - 1, margins


def test_motor_hum_stops_with_the_power_while_the_shaft_still_turns():
    def drops(component):
        """Decibels by which 0.1 s at power-off exceed 0.1 s just after it, less what slowing down can explain."""
        values = []
        for k in range(40):
            waveform, timeline = sound_world.synthesize_clip(component, np.random.default_rng([8, k]), 4.0)
            event = timeline["events"][0]
            if event["phases"][-1]["kind"] == "coast_down" and event["phases"][-1]["start"] < 3.8:
                cut = int(event["phases"][-1]["start"] * RATE)
                before, after = waveform[cut - 1600 : cut], waveform[cut + 640 : cut + 2240]
                at_cut, later = sound_world.lagged_curve(event, "speed_hz", np.array([cut, cut + 1440]) / RATE)
                assert later > 0.6 * at_cut
                slowing = 2.2 * 20 * np.log10(at_cut / later)  # 2.2: the steepest law there is
                values.append(10 * np.log10(np.mean(before**2) / np.mean(after**2)) - slowing)
        assert len(values) >= 10
        return values

    motor, fan = drops("motor"), drops("fan")
    assert np.median(motor) > 6 and np.median(fan) < 2, (motor, fan)


def test_bearing_envelope_peaks_at_the_impact_rate():
    margins, wrong = [], []
    for waveform, event in clips("bearing"):
        orders, power = order_spectrum(envelope(waveform, 1800, 7000), event, 1024)
        rate = event["geometry"]["impacts_per_turn"]
        margins.append(prominence(orders, power, rate, halfwidth=0.015))
        wrong.append(prominence(orders, power, rate * 1.13, halfwidth=0.015))
    assert count_above(margins, 10) >= INDIVIDUALS - 1, margins
    assert np.median(margins) > np.median(wrong) + 5, (margins, wrong)


@pytest.mark.parametrize("part", ["pulses", "valves"])
def test_compressor_repeats_with_every_turn_of_the_crank(part):
    margins = []
    for waveform, event in clips("compressor"):
        # All machines have shaft harmonics, up to the 40th; clicks and gas far above come once per turn here only.
        signal = waveform if part == "pulses" else envelope(waveform, 1500, 7000)
        orders, power = order_spectrum(signal, event, 512)
        cycle = [power[np.abs(orders - order) < 0.04].sum() for order in range(1, 40)]
        between = [power[np.abs(orders - order - 0.5) < 0.04].sum() for order in range(1, 40)]
        margins.append(10 * np.log10(np.sum(cycle) / np.sum(between)))
    assert count_above(margins, 10) >= INDIVIDUALS - 1, margins


def test_compressor_cycle_is_the_textbook_one():
    pressure, valves = sound_world.pressure_cycle(ratio=4.0, clearance=0.08)
    assert pressure.max() == pytest.approx(4.0) and pressure.min() == pytest.approx(1.0)
    assert valves[0] == 0.0 and valves[2] == 0.5  # closing at the dead centres
    # Discharge opens where ((clearance + 1) / volume) ** 1.3 is 4, suction where 4 (clearance / volume) ** 1.3 is 1.
    volume = 0.08 + (1 - np.cos(2 * np.pi * valves[[3, 1]])) / 2
    assert volume == pytest.approx([1.08 / 4 ** (1 / 1.3), 0.08 * 4 ** (1 / 1.3)], rel=0.02)


def test_pump_crackles_in_bursts_and_a_motor_does_not():
    def kurtosis(waveform):
        high = np.real(np.fft.ifft(np.fft.fft(waveform) * (np.abs(np.fft.fftfreq(len(waveform), 1 / RATE)) > 2500)))
        return np.mean(high**4) / np.mean(high**2) ** 2

    pumps, motors = ([kurtosis(waveform) for waveform, _ in clips(name)] for name in ("pump", "motor"))
    assert np.median(pumps) > 2 * np.median(motors), (pumps, motors)


@pytest.mark.parametrize("component", sound_world.COMPONENTS)
def test_it_is_loud_when_the_timeline_says_so_and_only_then(component):
    margins = []
    for waveform, event in clips(component):
        on = np.zeros(len(waveform), dtype=bool)
        for phase in switched_on(event):
            on[int(phase["start"] * RATE) : int(phase["end"] * RATE)] = True
        off = np.ones(len(waveform), dtype=bool)
        off[max(0, int((event["start"] - 0.05) * RATE)) : int((event["end"] + 0.3) * RATE)] = False
        if off.sum() > 0.2 * RATE:
            margins.append(10 * np.log10(np.mean(waveform[on] ** 2) / np.mean(waveform[off] ** 2)))
    assert len(margins) >= 2
    assert np.median(margins) > 10, margins


@pytest.mark.parametrize("component", sound_world.COMPONENTS)
@pytest.mark.parametrize("shifted", [False, True])
def test_clips_are_clean_and_within_their_regime(component, shifted):
    low, high = sound_world.SPEED_RANGES[component]
    for waveform, event in clips(component, shifted):
        assert waveform.dtype == np.float32 and waveform.shape == (int(CLIP_SECONDS * RATE),)
        assert np.isfinite(waveform).all() and 0.001 < np.abs(waveform).max() <= 0.96
        running = [p for p in event["phases"] if p["kind"] != "coast_down"]
        assert sum(phase["end"] - phase["start"] for phase in running) >= CLIP_SECONDS / 2 - 0.01
        for phase in running:
            within = low - 0.01 <= phase["speed_hz"] <= high + 0.01
            assert within != shifted, (phase, low, high)


def test_shifted_clips_are_noisier():
    def noise_share(shifted):
        """Median over the clips of background power (before the machine starts) over power while it runs."""
        shares = []
        for component in sound_world.COMPONENTS:
            for waveform, event in clips(component, shifted):
                if event["start"] > 0.2:
                    start, end = int(switched_on(event)[0]["start"] * RATE), int(switched_on(event)[-1]["end"] * RATE)
                    background = np.mean(waveform[: int(event["start"] * RATE) - 800] ** 2)
                    shares.append(10 * np.log10(background / np.mean(waveform[start:end] ** 2)))
        return np.median(shares)

    assert noise_share(True) > noise_share(False) + 4


def test_phases_follow_each_other_and_six_machines_come_and_go():
    running_together = set()
    for k in range(20):
        schedule = sound_world.draw_schedule(np.random.default_rng([9, k]), 60.0)
        events = [event for _, event in schedule]
        assert [e["start"] for e in events] == sorted(e["start"] for e in events)
        for event in events:
            phases = event["phases"]
            assert event["start"] == phases[0]["start"] >= 0 and event["end"] == phases[-1]["end"] <= 60.0
            assert all(a["end"] == b["start"] for a, b in zip(phases, phases[1:]))
            assert all(p["end"] > p["start"] for p in phases)
        for component in sound_world.COMPONENTS:
            runs = [(machine, event) for machine, event in schedule if event["component"] == component]
            assert len(runs) >= 2 and all(machine is runs[0][0] for machine, _ in runs)
            assert all(a["end"] < b["start"] for (_, a), (_, b) in zip(runs, runs[1:]))
        moments = np.arange(0, 60, 0.25)
        running_together |= {sum(e["start"] <= moment < e["end"] for e in events) for moment in moments}
    assert running_together >= {0, 1, 2, 3, 4}


def test_a_recording_is_finite_and_as_long_as_its_timeline_says():
    waveform, timeline = sound_world.synthesize_recording(np.random.default_rng([9, 0]), 20.0)
    assert waveform.dtype == np.float32 and waveform.shape == (20 * RATE,) and timeline["duration"] == 20.0
    assert np.isfinite(waveform).all() and 0.001 < np.abs(waveform).max() <= 0.96
    assert {event["component"] for event in timeline["events"]} == set(sound_world.COMPONENTS)


def read_all(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the command line writes with two processes."""
    folder = tmp_path_factory.mktemp("world") / "two_processes"
    command = [sys.executable, DEMO / "synthesize.py", "--output_dir", folder, *SMALL, "--num_workers", "2"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_the_promised_files(written):
    for split, count in {"unlabeled": 6, "train": 12, "test": 6, "shifted": 6}.items():
        lines = [json.loads(line) for line in (written / f"{split}_timeline.jsonl").read_text().splitlines()]
        files = sorted(str(path.relative_to(written)) for path in (written / split).rglob("*.flac"))
        assert [line["file_name"] for line in lines] == files and len(files) == count
        for line in lines:
            info = soundfile.info(written / line["file_name"])
            assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
            assert info.duration == line["duration"] == (6.0 if split == "unlabeled" else 1.0)
            if split != "unlabeled":
                assert [event["component"] for event in line["events"]] == [Path(line["file_name"]).parent.name]
    assert (written / "figures" / "sound_world.png").stat().st_size > 50_000


def test_one_process_in_a_folder_with_other_files_of_before_writes_the_same_bytes(written, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesize, "draw_figure", lambda path, seed: None)  # seconds that prove nothing here
    for options in (["--labeled_per_class", "3", "--clip_seconds", "1.5"], []):
        synthesize.main(["--output_dir", str(tmp_path / "one"), *SMALL, *options, "--num_workers", "1"])
    one, two = read_all(tmp_path / "one"), read_all(written)
    assert two.keys() - one.keys() == {"figures/sound_world.png"} and one.keys() < two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_a_clip_depends_on_seed_split_and_number_only(tmp_path):
    jobs = {job[-1]: job for job in synthesize.jobs_of(synthesize.parse_arguments(["--output_dir", "x", *SMALL]))}
    more = synthesize.parse_arguments(["--output_dir", "x", *SMALL, "--labeled_per_class", "5"])
    assert set(jobs.values()) < set(synthesize.jobs_of(more))  # more clips leave the others as they are
    job = jobs["train/fan/0001.flac"]
    (tmp_path / "train" / "fan").mkdir(parents=True)
    (tmp_path / "test" / "fan").mkdir(parents=True)
    synthesize.synthesize_file(job, tmp_path, seed=0)
    first = (tmp_path / job[-1]).read_bytes()
    synthesize.synthesize_file(job, tmp_path, seed=1)
    assert (tmp_path / job[-1]).read_bytes() != first
    synthesize.synthesize_file(("test", *job[1:-1], "test/fan/0001.flac"), tmp_path, seed=0)
    assert (tmp_path / "test/fan/0001.flac").read_bytes() != first


def test_same_settings_do_nothing(written, capsys):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    synthesize.main(["--output_dir", str(written), *SMALL])
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in written.rglob("*")}


@pytest.mark.parametrize(
    "option, value",
    [
        ("--hours", "0"),
        ("--hours", "nan"),
        ("--labeled_per_class", "-1"),
        ("--test_per_class", "1.5"),
        ("--clip_seconds", "0.2"),
        ("--recording_seconds", "1"),
        ("--seed", "-3"),
        ("--num_workers", "0"),
        ("--colour", "red"),
    ],
)
def test_bad_values_exit_2_with_one_line_that_names_them(option, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as failure:
        synthesize.main(["--output_dir", str(tmp_path / "new"), option, value])
    lines = capsys.readouterr().err.splitlines()
    assert failure.value.code == 2 and len(lines) == 1 and option in lines[0]
    assert not (tmp_path / "new").exists()


def test_it_never_writes_into_a_folder_of_others(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as failure:
        synthesize.main(["--output_dir", str(tmp_path), *SMALL])
    assert failure.value.code == 2 and str(tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

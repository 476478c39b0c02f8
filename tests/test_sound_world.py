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

from acoustic.data.sources import open_rows  # noqa: E402

RATE = sound_world.SAMPLE_RATE
INDIVIDUALS = 8
CLIP_SECONDS = 20.0
SMALL = ["--hours", "0.01", "--labeled_per_class", "2", "--test_per_class", "1", "--recording_seconds", "6"]
SMALL += ["--clip_seconds", "1", "--plant_recordings", "1", "1", "2", "--mixed_clips", "2", "1", "3"]
SMALL += ["--fault_clips", "1", "1"]
# Every eighth of a recording's samples as they were when the demo's results were measured.
AS_MEASURED = {
    "unlabeled/rec_00002.flac": [-7, -473, 116, -464, 360, 433, 812, -705],
    "train/compressor/0001.flac": [-5, -777, -166, -1370, 2041, -1701, 1386, -6759],
    "train/motor/0000.flac": [1119, -440, -474, 1269, -821, 616, 503, 64],
    "test/fan/0000.flac": [-12, -178, -348, -307, -2937, -1803, -284, 3905],
    "test/bearing/0000.flac": [-305, -676, -40, 1060, -960, -5281, -1222, -4749],
    "shifted/pump/0000.flac": [-813, -147, -545, 0, -125, 512, 1180, -289],
    "shifted/gear/0000.flac": [-2022, 826, 953, 8685, -273, -3488, -2237, -249],
}


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


def test_spans_are_inside_and_the_machine_turns_in_them():
    running_together = []
    for k in range(20):
        schedule = sound_world.draw_schedule(np.random.default_rng([9, k]), 60.0)
        events = [event for _, event in schedule]
        spans = sound_world.running_spans({"duration": 60.0, "events": events})
        assert len(events) - 2 <= len(spans) <= len(events)
        assert [span["start"] for span in spans] == sorted(span["start"] for span in spans)
        for span in spans:
            assert 0 <= span["start"] < span["end"] <= 60.0
            middle, inside = (span["start"] + span["end"]) / 2, [span["start"] + 0.005, span["end"] - 0.005]
            (event,) = [e for e in events if e["component"] == span["label"] and e["start"] <= middle <= e["end"]]
            third = event["speed_hz"] / 3
            assert (sound_world.lagged_curve(event, "speed_hz", np.array(inside)) > 0.97 * third).all()
            if span["end"] < event["end"]:
                assert sound_world.lagged_curve(event, "speed_hz", np.array([span["end"] + 0.005])) < third
        moments = np.arange(0, 60, 0.5)
        running_together += [sum(s["start"] <= moment < s["end"] for s in spans) for moment in moments]
    assert {0, 1, 2, 3, 4} <= set(running_together)
    assert 1.5 < np.mean(running_together) < 2.5


def test_a_mixture_has_one_to_four_components_at_once():
    counts = []
    for k in range(60):
        waveform, timeline = sound_world.synthesize_mixture(np.random.default_rng([9, k]), 1.0)
        components = [event["component"] for event in timeline["events"]]
        assert components == [name for name in sound_world.COMPONENTS if name in components]  # each once, in order
        for event in timeline["events"]:
            on = [phase for phase in event["phases"] if phase["kind"] != "coast_down"]
            assert on[0]["start"] <= 0.35 and on[-1]["end"] >= 0.5  # all are on together from .35 to .5 s
        counts.append(len(components))
        assert waveform.dtype == np.float32 and waveform.shape == (RATE,) and 0.001 < np.abs(waveform).max() <= 0.96
    assert set(counts) == {1, 2, 3, 4}
    assert 1.7 < np.mean(counts) < 2.6


def read_all(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def length_of(path):
    """Seconds of a recording in the promised format."""
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
    return info.duration


@pytest.fixture
def no_figures(monkeypatch):
    """Seconds that prove nothing where only the recordings are looked at."""
    monkeypatch.setattr(synthesize, "draw_figures", lambda output_dir, parts, seed: None)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the command line writes with two processes."""
    folder = tmp_path_factory.mktemp("world") / "two_processes"
    command = [sys.executable, DEMO / "synthesize.py", "--output_dir", folder, *SMALL, "--num_workers", "2"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_the_promised_files(written):
    for split, count in {"unlabeled": 6, "train": 12, "test": 6, "shifted": 6}.items():
        lines = read_lines(written / f"{split}_timeline.jsonl")
        files = sorted(str(path.relative_to(written)) for path in (written / split).rglob("*.flac"))
        assert [line["file_name"] for line in lines] == files and len(files) == count
        for line in lines:
            assert line["duration"] == (6.0 if split == "unlabeled" else 1.0)
            assert length_of(written / line["file_name"]) == line["duration"]
            if split != "unlabeled":
                assert [event["component"] for event in line["events"]] == [Path(line["file_name"]).parent.name]
    assert (written / "figures" / "sound_world.png").stat().st_size > 50_000
    assert (written / "figures" / "faults.png").stat().st_size > 50_000
    assert list(json.loads((written / "settings.json").read_text())) == list(synthesize.PARTS)


@pytest.mark.parametrize(
    "folder, count, seconds, columns",
    [
        ("plant/train", 1, 6.0, ["spans"]),
        ("plant/validation", 1, 6.0, ["spans"]),
        ("plant/test", 2, 6.0, ["spans"]),
        ("mixed/train", 2, 1.0, ["components"]),
        ("mixed/validation", 1, 1.0, ["components"]),
        ("mixed/test", 3, 1.0, ["components"]),
        ("faults/train", 12, 1.0, ["machine", "label"]),
        ("faults/test", 24, 1.0, ["machine", "label"]),
    ],
)
def test_the_promised_tables(written, folder, count, seconds, columns):
    lines = read_lines(written / folder / "metadata.jsonl")
    files = sorted(str(path.relative_to(written / folder)) for path in (written / folder).rglob("*.flac"))
    assert [line["file_name"] for line in lines] == files and len(files) == count
    for line in lines:
        assert list(line) == ["file_name", *columns]
        assert length_of(written / folder / line["file_name"]) == seconds
        for span in line.get("spans", []):
            assert 0 <= span["start"] < span["end"] <= seconds and span["label"] in sound_world.COMPONENTS
        if "components" in line:
            assert 1 <= len(line["components"]) <= 4 and set(line["components"]) <= set(sound_world.COMPONENTS)
    if folder.startswith("faults"):
        assert [line["machine"] for line in lines] == [Path(line["file_name"]).parent.name for line in lines]
        assert [line["label"] for line in lines].count("normal") == 12  # in the test as many with a fault


@pytest.mark.parametrize("part, column", [("plant", "spans"), ("mixed", "label"), ("faults", "label")])
def test_the_tables_open_as_data_sets(written, part, column):
    columns = {"plant": {"spans_column": "spans"}, "mixed": {"label_column": "components"}}
    for folder in synthesize.PARTS[part]:
        rows = open_rows(str(written / part), folder.split("/")[1], **columns.get(part, {"label_column": "label"}))
        lines = read_lines(written / folder / "metadata.jsonl")
        key = {"plant": "spans", "mixed": "components"}.get(part, "label")
        assert [rows[k][column] for k in range(len(rows))] == [line[key] for line in lines]
        assert all(Path(rows[k]["audio"]["path"]).is_file() for k in range(len(rows)))


def test_the_recordings_are_those_that_the_results_were_measured_on(written):
    for name, samples in AS_MEASURED.items():
        waveform, _ = soundfile.read(written / name, dtype="int16")
        found = waveform[len(waveform) // 16 :: len(waveform) // 8]
        # Another processor may round the last bit otherwise.
        np.testing.assert_allclose(found, samples, atol=1, err_msg=name)


def test_one_process_in_a_folder_with_other_files_of_before_writes_the_same_bytes(written, tmp_path, no_figures):
    others = ["--labeled_per_class", "3", "--clip_seconds", "1.5", "--plant_recordings", "2", "1", "3"]
    for options in ([*others, "--fault_clips", "2", "1"], []):
        synthesize.main(["--output_dir", str(tmp_path / "one"), *SMALL, *options, "--num_workers", "1"])
    one, two = read_all(tmp_path / "one"), read_all(written)
    assert two.keys() - one.keys() == {"figures/sound_world.png", "figures/faults.png"} and one.keys() < two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_only_the_parts_that_are_asked_for_and_differ_are_made(tmp_path, no_figures, capsys):
    def write(*options):
        synthesize.main(["--output_dir", str(tmp_path / "parts"), *SMALL, "--num_workers", "1", *options])
        return read_all(tmp_path / "parts")

    first = write("--parts", "mixed")
    assert {Path(name).parts[0] for name in first} == {"mixed", "settings.json"}
    both = write("--parts", "plant", "mixed")
    assert {Path(name).parts[0] for name in both} == {"mixed", "plant", "settings.json"}
    (tmp_path / "parts" / "mixed" / "mine.txt").write_text("mine")
    other = write("--parts", "mixed", "--mixed_clips", "1", "1", "1")
    assert {name: text for name, text in other.items() if name.startswith("plant")} == {
        name: text for name, text in both.items() if name.startswith("plant")
    }
    assert "mixed/train/00001.flac" in both and "mixed/train/00001.flac" not in other and "mixed/mine.txt" in other
    capsys.readouterr()
    assert write("--parts", "plant") == other and "nothing to do" in capsys.readouterr().out


def test_settings_of_before_there_were_parts_are_none(tmp_path, no_figures):
    (tmp_path / "settings.json").write_text('{"hours": 1.0, "seed": 0}')
    synthesize.main(["--output_dir", str(tmp_path), *SMALL, "--parts", "mixed", "--num_workers", "1"])
    assert list(json.loads((tmp_path / "settings.json").read_text())) == ["mixed"]


@pytest.mark.parametrize("part", synthesize.PARTS)
def test_more_files_leave_the_others_as_they_are(part):
    few = synthesize.parse_arguments(["--output_dir", "x", *SMALL])
    more = ["--labeled_per_class", "5", "--plant_recordings", "3", "3", "3", "--mixed_clips", "9", "9", "9"]
    many = synthesize.parse_arguments(["--output_dir", "x", *SMALL, *more, "--fault_clips", "4", "4"])
    assert set(synthesize.jobs_of(few, part)) < set(synthesize.jobs_of(many, part))


def test_a_file_depends_on_seed_folder_and_number_only(tmp_path):
    def content(folder, number=7, seed=0, name="fan"):
        job = synthesize.Job(folder, number, name, 1.0, "clip.flac")
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        synthesize.synthesize_file(job, tmp_path, seed)
        return (tmp_path / folder / "clip.flac").read_bytes()

    for folder, name in {"train": "fan", "mixed/train": None, "faults/test": "fan_01"}.items():
        first = content(folder, name=name)
        assert content(folder, name=name) == first
        assert content(folder, name=name, seed=1) != first and content(folder, name=name, number=8) != first
    assert content("train") != content("test")
    assert content("mixed/train", name=None) != content("mixed/test", name=None)
    assert content("faults/train", number=12, name="fan_01") != content("faults/test", number=0, name="fan_01")
    assert len(set(synthesize.STREAMS.values())) == len(synthesize.STREAMS)


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
        ("--parts", "everything"),
        ("--mixed_clips", "4"),
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

"""The demo's faults: each is heard in the measure that defines it, and nothing else gives it away.

A clip with a fault is compared with the clip that the same draws give without it.
"""

import functools
import sys

import numpy as np
import pytest
from test_sound_world import DEMO, RATE, envelope, order_spectrum, prominence

sys.path.insert(0, str(DEMO))

import faults  # noqa: E402
import sound_world  # noqa: E402

SECONDS = 8.0
MACHINES = tuple(machine for machine in faults.MACHINE_IDS if not machine.endswith("02"))


@functools.cache
def clip(machine_id, label, take=0):
    """(waveform, event) of one machine; a take has the same speed, load and background whatever the label."""
    rng = np.random.default_rng([11, faults.MACHINE_IDS.index(machine_id), take])
    return faults.synthesize_machine(faults.draw_individual(machine_id, 0), label, rng, SECONDS)


def machines_with(fault):
    return [machine for machine in MACHINES if fault in faults.FAULTS[machine.split("_")[0]]]


def gains(fault, measure):
    """Decibels by which `measure` (waveform, event, machine) exceeds the same moments' without the fault."""
    return [
        measure(*clip(machine, fault), machine) - measure(*clip(machine, faults.NORMAL), machine)
        for machine in machines_with(fault)
    ]


def impact_line(waveform, event, machine, factor=1.0):
    """Prominence of the bearing's fault frequency, times `factor`, in the spectrum of the treble's envelope."""
    order = faults.draw_individual(machine, 0).bearing["impacts_per_turn"] * factor
    return prominence(*order_spectrum(envelope(waveform, 2000, 7000), event, 1024), order, halfwidth=0.015)


def once_per_turn(waveform, event, machine):
    """Decibels of the envelope's line at the shaft rate over what lies around it."""
    orders, power = order_spectrum(envelope(waveform, 150, 7000), event, 256)
    around = (orders > 0.3) & (orders < 12)
    return 10 * np.log10(power[np.abs(orders - 1) < 0.04].max() / np.median(power[around]))


def lowest_line(waveform, event, machine):
    """Decibels of the shaft rate itself in all of the sound's power."""
    orders, power = order_spectrum(waveform, event, 512)
    return 10 * np.log10(power[np.abs(orders - 1) < 0.04].sum() / power.sum())


def top_share(waveform, event, machine):
    """Decibels of what lies above 5 kHz in all of the sound's power."""
    power = np.abs(np.fft.rfft(waveform)) ** 2
    return 10 * np.log10(power[np.fft.rfftfreq(len(waveform), 1 / RATE) > 5000].sum() / power.sum())


def test_a_damaged_bearing_is_struck_at_its_fault_frequency():
    right = gains("bearing", impact_line)
    wrong = gains("bearing", functools.partial(impact_line, factor=1.13))
    assert np.median(right) > 6, right
    assert np.median(right) > np.median(wrong) + 5, (right, wrong)


def test_imbalance_swells_once_per_turn_and_raises_the_shaft_rate():
    swelling, line = gains("imbalance", once_per_turn), gains("imbalance", lowest_line)
    assert np.median(swelling) > 12, swelling
    assert np.median(line) > 1, line


def test_a_leak_hisses():
    right, wrong = gains("leak", top_share), gains("imbalance", top_share)
    assert min(right) > 0.1 and np.median(right) > 0.5, right
    assert np.median(np.abs(wrong)) < 0.5, wrong


def test_a_compressor_leaks_with_its_pressure():
    individual = faults.draw_individual("compressor_00", 0)
    samples = int(SECONDS * RATE)
    motion = sound_world.Motion(
        np.arange(samples) * 2.0 / RATE, np.ones(samples), np.ones(samples), np.ones(samples), 2.0
    )
    event = {"component": "compressor", "geometry": {"cylinders": 1, "pressure_ratio": 4.0}}
    sound = sound_world.noise(np.random.default_rng(0), samples)
    jet = faults.spring_leak(individual, sound, event, motion, np.random.default_rng(1)) - sound
    in_turn = np.sqrt(np.mean((jet**2).reshape(-1, RATE // 2), axis=0).reshape(64, -1).mean(axis=1))  # 64 per turn
    pressure, _ = sound_world.pressure_cycle(4.0, clearance=0.08)
    assert np.corrcoef(in_turn, pressure.reshape(64, -1).mean(axis=1))[0, 1] > 0.98
    suction, discharge = in_turn[20:30], in_turn[58:63]
    assert suction.mean() < 0.02 * discharge.mean()


def test_level_and_length_tell_nothing():
    """The level is drawn before the fault, and a clip of that level is made with or without it."""
    for machine in MACHINES:
        normal, _ = clip(machine, faults.NORMAL)
        for fault in faults.FAULTS[machine.split("_")[0]]:
            faulty, _ = clip(machine, fault)
            assert faulty.shape == normal.shape == (int(SECONDS * RATE),)
            assert not np.allclose(faulty, normal, rtol=0.1)
            quieter = np.abs([normal, faulty]).max() > 0.9  # that one was kept from clipping
            assert quieter or np.std(faulty) == pytest.approx(np.std(normal), rel=0.01)


def test_speed_and_load_tell_nothing():
    for machine in MACHINES[::2]:
        events = [clip(machine, label)[1] for label in (faults.NORMAL, *faults.FAULTS[machine.split("_")[0]])]
        assert all(event == events[0] for event in events)


def test_an_individual_stays_what_and_where_it_is():
    one, again = (faults.draw_individual("fan_01", 0) for _ in range(2))
    assert one.machine == again.machine and one.bearing == again.bearing and one.metres == again.metres
    np.testing.assert_array_equal(one.reverberation, again.reverberation)
    others = [faults.draw_individual(machine, 0).machine.seed for machine in faults.MACHINE_IDS]
    assert len(set(others)) == len(faults.MACHINE_IDS) == 12
    assert faults.draw_individual("fan_01", 1).machine.seed != one.machine.seed


def test_the_clip_follows_from_the_draws_alone():
    first, second = (
        faults.synthesize_machine(faults.draw_individual("pump_02", 0), "leak", np.random.default_rng(3), 1.0)[0]
        for _ in range(2)
    )
    other, _ = faults.synthesize_machine(faults.draw_individual("pump_02", 0), "leak", np.random.default_rng(4), 1.0)
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first, other)
    assert first.dtype == np.float32 and np.isfinite(first).all() and 0.001 < np.abs(first).max() <= 0.96


@pytest.mark.parametrize("machine", ["motor_00", "fan_02"])
def test_half_of_the_test_clips_are_normal_and_the_faults_take_turns(machine):
    labels = [faults.label_of(machine, number) for number in range(24)]
    kinds = faults.FAULTS[machine.split("_")[0]]
    assert labels.count(faults.NORMAL) == 12
    assert {kind: labels.count(kind) for kind in kinds} == dict.fromkeys(kinds, 12 // len(kinds))

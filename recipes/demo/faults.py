"""Individual machines that run as they should, or with a fault: damaged bearing, imbalance, leak.

An individual stands in its place for good: same machine, distance, room and microphone in each of its clips. Speed,
load, background and the recording's level differ from clip to clip, and are drawn alike with and without a fault.
Levels and depths were set so that telling the faults from log-mel statistics is neither trivial nor impossible.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import sound_world
from scipy.signal import oaconvolve
from sound_world import SAMPLE_RATE, from_db, noise, play, unit_power

NORMAL = "normal"
INDIVIDUALS = 3  # of each component
# A motor has no pressure that could escape.
FAULTS = {
    "motor": ("bearing", "imbalance"),
    "compressor": ("bearing", "imbalance", "leak"),
    "fan": ("bearing", "imbalance", "leak"),
    "pump": ("bearing", "imbalance", "leak"),
}
MACHINE_IDS = tuple(f"{component}_{number:02d}" for component in FAULTS for number in range(INDIVIDUALS))
TREBLE_HZ = 2000.0
SEED_OF_INDIVIDUALS = 1000  # beside the world's seed and the component's number


@dataclass
class Individual:
    """A machine, and how it is heard."""

    machine: sound_world.Machine
    metres: float
    reverberation: np.ndarray  # impulse response of the room at the microphone, (samples,)
    tilt: float  # of the microphone, dB per octave
    bearing: dict  # geometry of its bearing and the race that gets damaged, see `sound_world.draw_bearing`


def draw_individual(machine_id, seed):
    """The same machine in the same place, whenever the world has the same seed."""
    component, number = machine_id.split("_")
    rng = np.random.default_rng([seed, SEED_OF_INDIVIDUALS, list(FAULTS).index(component), int(number)])
    machine = sound_world.draw_machine(component, rng)
    reverberation = from_db(rng.uniform(-20, -8)).astype(np.float32) * sound_world.room_response(rng)
    distance, tilt = sound_world.log_uniform(rng, 0.5, 3.0), rng.uniform(-0.8, 0.8)
    return Individual(machine, distance, reverberation, tilt, sound_world.draw_bearing(rng))


def label_of(machine_id, number):
    """What the test clip `number` of a machine has: every other one is normal, the others take turns."""
    faults = FAULTS[machine_id.split("_")[0]]
    return faults[number // 2 % len(faults)] if number % 2 else NORMAL


# ---------------------------------------------------------------------------------------------------------------------
# The faults: (individual, sound, event, motion, rng) -> sound, (samples,) float32; the given sound has power 1
# ---------------------------------------------------------------------------------------------------------------------


def treble(signal):
    """Root mean square of what a signal has from TREBLE_HZ up, by Parseval's theorem."""
    spectrum = np.fft.rfft(signal)[round(TREBLE_HZ * len(signal) / SAMPLE_RATE) :]
    return np.sqrt(2 * np.sum(np.abs(spectrum) ** 2)) / len(signal)


def added(sound, extra, decibels):
    """The sound with `extra` as many dB above what the sound itself has from TREBLE_HZ up, where both faults sound."""
    return sound + extra * np.float32(from_db(decibels) * treble(sound) / (treble(extra) + 1e-9))


def damage_bearing(individual, sound, event, motion, rng):
    """A race struck by each roller: impacts at the bearing's fault frequency that ring at 2 to 6 kHz.

    The physics is the component's own, see `sound_world.render_bearing` (Randall & Antoni 2011); here the impacts are
    a small part of another machine's sound. Race and resonances are this machine's at each occasion.
    """
    structure = np.random.default_rng(individual.machine.seed)
    impacts = sound_world.render_bearing({"geometry": individual.bearing}, motion, structure, rng)
    return added(sound, impacts, rng.uniform(-15, -7))


def unbalance(individual, sound, event, motion, rng):
    """A heavy spot pulls outwards with m e omega^2: all that sounds swells once per turn, and 1x shaft rate is raised.

    ISO 21940-11 judges the same force by e omega; that imbalance is the line at 1x, with little at 2x and 3x, is in
    every table of vibration causes (e.g. ISO 13373-3, annex).
    """
    once = np.cos(2 * np.pi * (motion.turns + rng.uniform())).astype(np.float32)
    force = np.clip(motion.drive**2, 0, 1.5)
    depth = rng.uniform(0.3, 0.55) * force
    low = play(sound_world.wavetable(np.array([1.0, 0.25, 0.1]), rng), motion.turns)
    return sound * (1 + depth * once) + from_db(rng.uniform(-20, -13)).astype(np.float32) * force * low


def spring_leak(individual, sound, event, motion, rng):
    """A jet of escaping gas: noise that rises towards its peak, as loud as the pressure behind it at that moment.

    Jet noise peaks near 0.2 x speed / diameter (Strouhal number, Tam et al., AIAA 96-1716): 30 kHz for 2 mm at the
    speed of sound, so all that is heard here lies on the rising side.
    """
    jet = oaconvolve(noise(rng, len(motion)), sound_world.tilt_response(rng.uniform(3.0, 6.0)), mode="same")
    geometry = event["geometry"]
    if event["component"] == "compressor":  # a gasket of one cylinder: gauge pressure, none during suction
        pressure, _ = sound_world.pressure_cycle(geometry["pressure_ratio"], clearance=0.08)
        gauge = np.repeat(pressure - 1, sound_world.TABLE_SIZE // len(pressure)).astype(np.float32)
        behind = play(gauge / gauge.max(), motion.turns + rng.integers(geometry["cylinders"]) / geometry["cylinders"])
    else:  # a flange or a duct: the head, which follows the speed's square (affinity law), pulsed by each blade
        blades = geometry.get("blades") or geometry.get("vanes")
        behind = motion.drive**2 * (1 + rng.uniform(0.2, 0.5) * np.cos(2 * np.pi * blades * motion.turns))
    return added(sound, jet * behind.astype(np.float32), rng.uniform(-13, -5))


# ---------------------------------------------------------------------------------------------------------------------
# The recording
# ---------------------------------------------------------------------------------------------------------------------


RENDER_FAULT = {"bearing": damage_bearing, "imbalance": unbalance, "leak": spring_leak}


def synthesize_machine(individual, label, rng, seconds=4.0):
    """A clip of an individual that runs all the time and changes its load; with a fault unless `label` is "normal".

    Returns:
        waveform (samples,) float32 at SAMPLE_RATE, and its event (see `sound_world.draw_event`).
    """
    machine = individual.machine
    event = sound_world.draw_event(machine, None, None, seconds, rng)
    signal_to_noise, level = rng.uniform(15.0, 28.0), from_db(rng.uniform(-34, -20))
    around = sound_world.background(rng, round(seconds * SAMPLE_RATE))
    fault = None if label == NORMAL else partial(RENDER_FAULT[label], individual)
    sound = sound_world.render_event(machine, event, rng, fault)
    heard = sound_world.filtered(sound, sound_world.distance_response(individual.metres))
    heard = unit_power(heard + sound_world.filtered(sound, individual.reverberation))
    heard = heard + around * from_db(-signal_to_noise).astype(np.float32)
    heard = unit_power(oaconvolve(heard, sound_world.tilt_response(individual.tilt), mode="same")) * level
    return (heard * min(1.0, 0.95 / np.abs(heard).max())).astype(np.float32), event

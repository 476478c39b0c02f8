"""A synthesised plant of slow, heavy machines: six components, each from its physics, on timelines, in a room.

Nothing here was recorded. Every number below is a plausible textbook value, or was set so that the demo's task is
neither trivial nor impossible; results on this world say nothing about real machines.

A recording is made in this order, and each step is one section of the file:
individual machine (geometry, speed) -> timeline (phases) -> motion (speed, angle, load) -> sound of the component
-> body and distance -> room -> background -> microphone.
The timeline is the score: the sound is rendered from the very dictionary that is written to the disk.
"""

from dataclasses import dataclass

import numpy as np
from scipy.signal import oaconvolve

SAMPLE_RATE = 16_000
NYQUIST = SAMPLE_RATE / 2
CONTROL_HOP = 32  # samples between the points of speed, load and level curves: 2 ms, well below every lag
TABLE_SIZE = 2**15  # so fine that reading the nearest entry keeps the 50th harmonic's error at -45 dB

# Shaft rates in Hz of a slow, heavy plant (mills, process compressors, cooling-tower fans: 85 to 500 turns a minute),
# where a turn, a stroke or a blade is long enough to be heard as an event. They overlap: the speed must not tell the
# component.
SPEED_RANGES = {
    "motor": (2.4, 8.0),
    "compressor": (1.4, 4.5),
    "fan": (1.9, 7.2),
    "pump": (2.2, 8.0),
    "bearing": (1.9, 8.0),
    "gear": (1.6, 7.2),
}
COMPONENTS = tuple(SPEED_RANGES)


# ---------------------------------------------------------------------------------------------------------------------
# Small tools
# ---------------------------------------------------------------------------------------------------------------------


def log_uniform(rng, low, high, size=None):
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def from_db(decibels):
    return 10.0 ** (np.asarray(decibels) / 20.0)


def unit_power(signal):
    """Scale to mean square 1; silence stays silence."""
    return signal / np.float32(np.sqrt(np.mean(signal**2)) + 1e-9)


def noise(rng, samples):
    return rng.standard_normal(samples, dtype=np.float32)


def to_audio_rate(control, samples):
    """Linear interpolation of (points,) values, CONTROL_HOP samples apart, to (samples,)."""
    ramp = np.arange(CONTROL_HOP) / CONTROL_HOP
    return (control[:-1, None] + np.diff(control)[:, None] * ramp).reshape(-1)[:samples]


def slow_wander(rng, points, seconds_per_knot):
    """(points,) smooth noise at the control rate, about +-1, that moves every `seconds_per_knot`."""
    knot_distance = seconds_per_knot * SAMPLE_RATE / CONTROL_HOP
    knots = rng.standard_normal(int(points / knot_distance) + 2)
    return np.interp(np.arange(points) / knot_distance, np.arange(len(knots)), knots)


def wavetable(amplitudes, rng):
    """One period (TABLE_SIZE,) of the harmonics 1, 2, ... with these amplitudes, random phases, and power 1."""
    spectrum = np.zeros(TABLE_SIZE // 2 + 1, dtype=np.complex64)
    spectrum[1 : len(amplitudes) + 1] = amplitudes * np.exp(2j * np.pi * rng.uniform(size=len(amplitudes)))
    return unit_power(np.fft.irfft(spectrum).astype(np.float32))


def band_limited(period, harmonics):
    """The period (n,) of any function, resampled to TABLE_SIZE with only its first `harmonics`, zero mean, power 1."""
    kept = np.zeros(TABLE_SIZE // 2 + 1, dtype=complex)
    spectrum = np.fft.rfft(period)
    count = min(harmonics, len(spectrum) - 1)
    kept[1 : count + 1] = spectrum[1 : count + 1]
    return unit_power(np.fft.irfft(kept).astype(np.float32))


def play(table, cycles):
    """Read a periodic table (TABLE_SIZE,) at the phase `cycles` (samples,), in periods."""
    return table[(cycles * TABLE_SIZE).astype(np.int64) & (TABLE_SIZE - 1)]


def harmonics_below_nyquist(fundamental_hz, at_most):
    """How many harmonics stay below Nyquist at this (top) fundamental; at least one."""
    return int(np.clip(0.95 * NYQUIST / fundamental_hz, 1, at_most))


def falling_harmonics(rng, count, decibels_per_octave, scatter_db=5.0):
    """(count,) amplitudes 1/k^slope, scattered: no two machines share a timbre."""
    order = np.arange(1, count + 1)
    return from_db(-decibels_per_octave * np.log2(order) + scatter_db * rng.standard_normal(count))


def ringing(frequencies, decay_seconds, gains):
    """Impulse response of resonances: sum of exponentially decaying sines, (samples,) float32, energy 1."""
    length = min(int(6 * np.max(decay_seconds) * SAMPLE_RATE), SAMPLE_RATE // 2)
    time = np.arange(length)[:, None] / SAMPLE_RATE
    response = (gains * np.exp(-time / decay_seconds) * np.sin(2 * np.pi * frequencies * time)).sum(axis=1)
    return (response / np.linalg.norm(response)).astype(np.float32)


def filtered(signal, impulse_response):
    """Causal convolution, cut to the signal's length."""
    return oaconvolve(signal, impulse_response)[: len(signal)]


# ---------------------------------------------------------------------------------------------------------------------
# Individual machines
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """One individual. What `seed` draws (timbre, resonances, mixture) is the same at its every start."""

    component: str
    geometry: dict  # what the timeline tells: number of blades, teeth, ...
    speed_hz: float  # nominal shaft rate
    speed_factors: tuple  # a load change multiplies the speed by something between these two
    run_up_seconds: float  # first-order time constants
    coast_seconds: float
    seed: int


def draw_machine(component, rng, shifted=False):
    """A random individual; `shifted` ones run slower or faster than any usual one."""
    low, high = SPEED_RANGES[component]
    if shifted:
        speed = low * rng.uniform(0.55, 0.75) if rng.uniform() < 0.5 else high * rng.uniform(1.35, 1.7)
        factors = (0.88, 1.12)
    else:
        speed = log_uniform(rng, low, high)
        factors = (max(0.72, low / speed), min(1.35, high / speed))
    geometry = draw_geometry(component, rng)
    if component == "motor":
        speed, factors = connect_to_the_line(geometry, speed, factors, rng, on_inverter=shifted or rng.uniform() < 0.5)
    return Machine(
        component=component,
        geometry=geometry,
        speed_hz=round(float(speed), 3),
        speed_factors=factors,
        run_up_seconds=round(float(log_uniform(rng, 0.2, 0.8)), 3),
        coast_seconds=round(float(log_uniform(rng, 0.25, 0.8)), 3),
        seed=int(rng.integers(2**31)),
    )


def draw_geometry(component, rng):
    """What makes the orders (multiples of the shaft rate) of an individual."""
    if component == "motor":
        return {"pole_pairs": int(rng.integers(8, 21)), "rotor_slots": int(rng.integers(24, 45))}
    if component == "compressor":
        return {"cylinders": int(rng.integers(1, 4)), "pressure_ratio": round(rng.uniform(2.5, 8.0), 2)}
    if component == "fan":
        return {"blades": int(rng.integers(4, 10))}
    if component == "pump":
        return {"vanes": int(rng.integers(4, 9))}
    if component == "bearing":
        return draw_bearing(rng)
    pinion = int(rng.integers(17, 36))
    return {"teeth": pinion, "wheel_teeth": int(pinion * rng.uniform(1.2, 3.5)) + 1}


def draw_bearing(rng):
    """A damaged race is struck n/2 (1 -+ d/D cos(contact angle)) times per turn: outer (BPFO) -, inner (BPFI) +.

    Randall & Antoni, "Rolling element bearing diagnostics - a tutorial", 2011, section 2.
    """
    rollers, ratio = int(rng.integers(7, 14)), rng.uniform(0.15, 0.3) * np.cos(np.deg2rad(rng.uniform(0, 25)))
    race = "outer" if rng.uniform() < 0.5 else "inner"
    order = rollers / 2 * (1 - ratio if race == "outer" else 1 + ratio)
    return {"rollers": rollers, "race": race, "impacts_per_turn": round(order, 4)}


def connect_to_the_line(geometry, speed, factors, rng, on_inverter):
    """Shaft rate = line / pole pairs x (1 - slip). On an inverter the line follows the speed; else it is 50 or 60 Hz.

    Fills in `geometry`; returns the nominal speed and its factors.
    """
    slip = rng.uniform(0.01, 0.06)
    geometry["slip"] = round(slip, 4)
    geometry["on_inverter"] = on_inverter
    if on_inverter:
        geometry["pole_pairs"] = min(geometry["pole_pairs"], max(1, int(100 / speed)))
        geometry["line_hz"] = round(speed * geometry["pole_pairs"] / (1 - slip), 3)
        return speed, factors
    line = 50.0 if rng.uniform() < 0.5 else 60.0
    geometry["line_hz"] = line
    return line / geometry["pole_pairs"] * (1 - slip), (0.97, 1.0)  # load only changes the slip


# ---------------------------------------------------------------------------------------------------------------------
# Timeline
# ---------------------------------------------------------------------------------------------------------------------


def draw_event(machine, start, stop, seconds, rng):
    """One run of a machine as a dictionary (the timeline's event).

    Args:
        start: second at which it is switched on; None: it was already running when the recording began.
        stop: second at which it is switched off; None: it runs beyond the recording's end.
        seconds: the recording's length; phases are cut there.

    Speed and load follow each phase's target with a first-order lag `tau`, see `lagged_curve`.
    """
    load, speed = round(rng.uniform(0.4, 0.8), 3), machine.speed_hz
    time, phases = start or 0.0, []
    power_off = seconds if stop is None else stop

    def add(kind, duration, limit, tau):
        nonlocal time
        end = round(min(time + duration, limit), 3)
        if end > time:
            target = {"speed_hz": 0.0, "load": 0.0} if kind == "coast_down" else {"speed_hz": speed, "load": load}
            phases.append({"kind": kind, "start": time, "end": end, **target, "tau": tau})
            time = end

    tau = machine.run_up_seconds
    if start is not None:
        add("run_up", 3 * tau, power_off, tau)
    while time < round(power_off, 3):
        add("steady", rng.uniform(0.5, 3.0), power_off, tau)
        speed, load = changed_load(machine, speed, load, rng)
        tau = round(rng.uniform(0.1, 0.5), 3)
        add("load_change", 3 * tau, power_off, tau)
    if stop is not None:
        add("coast_down", 3.5 * machine.coast_seconds, seconds, machine.coast_seconds)
    return {
        "component": machine.component,
        "start": phases[0]["start"],
        "end": phases[-1]["end"],
        "speed_hz": machine.speed_hz,
        "geometry": dict(machine.geometry),
        "phases": phases,
    }


def changed_load(machine, speed, load, rng):
    """Another load, and the speed that goes with it, within the machine's bounds."""
    low, high = machine.speed_factors
    factor = rng.uniform(low, high)
    if abs(factor * machine.speed_hz / speed - 1) < 0.1:  # too small to hear: go to the bound that is further away
        factor = low if speed / machine.speed_hz > (low * high) ** 0.5 else high
    new_load = rng.uniform(0.6, 1.0) if load < 0.5 else rng.uniform(0.1, 0.45)
    return round(float(factor * machine.speed_hz), 3), round(new_load, 3)


def lagged_curve(event, quantity, times):
    """`quantity` ("speed_hz" or "load") of an event at `times` (n,), in seconds of the recording: (n,) float64.

    Each phase approaches its target exponentially with its `tau`. A machine that runs up starts from 0; one that was
    already running starts at its first target. Valid between the event's start and end.
    """
    phases = event["phases"]
    value = 0.0 if phases[0]["kind"] == "run_up" else phases[0][quantity]
    curve = np.full(len(times), value)
    for phase in phases:
        target, since = phase[quantity], times - phase["start"]
        inside = since >= 0
        curve[inside] = target + (value - target) * np.exp(-since[inside] / phase["tau"])
        value = target + (value - target) * np.exp(-(phase["end"] - phase["start"]) / phase["tau"])
    return curve


def running_spans(timeline, share=1 / 3):
    """When each component runs: [{"start", "end", "label"}, ...], in seconds, in the order of starts.

    A machine runs while its shaft turns at more than `share` of its nominal speed, switched on or coasting down. At a
    third its sound is some 15 dB below its usual level: it has just become, or just ceased to be, audible.
    """
    spans = []
    for event in timeline["events"]:
        times = np.arange(event["start"], event["end"], 0.001)
        turning = np.flatnonzero(lagged_curve(event, "speed_hz", times) > share * event["speed_hz"])
        if len(turning) > 1:  # else it had hardly begun when the recording ended
            start, end = times[turning[0]], min(times[turning[-1]] + 0.001, event["end"])
            spans.append({"start": round(float(start), 3), "end": round(float(end), 3), "label": event["component"]})
    return sorted(spans, key=lambda span: (span["start"], span["label"]))


def draw_clip_event(component, rng, seconds, shifted=False):
    """A machine and one run of it that is switched on for at least half of the clip."""
    machine = draw_machine(component, rng, shifted)
    start = round(rng.uniform(0.02, 0.35) * seconds, 3) if rng.uniform() < 0.5 else None
    stop = None
    if rng.uniform() < 0.4:
        stop = round(rng.uniform((start or 0.0) / seconds + 0.5, 0.93) * seconds, 3)
    return machine, draw_event(machine, start, stop, seconds, rng)


def draw_schedule(rng, seconds, shifted=False):
    """A plant with one machine of each component, and their runs: list of (machine, event) in the order of starts."""
    schedule = []
    for component in COMPONENTS:
        machine = draw_machine(component, rng, shifted)
        for start, stop in draw_times(rng, seconds):
            schedule.append((machine, draw_event(machine, start, stop, seconds, rng)))
    return sorted(schedule, key=lambda pair: (pair[1]["start"], pair[1]["component"]))


def draw_times(rng, seconds):
    """(on, off) seconds of one machine: some seconds of running, more of silence; off is None beyond the recording."""
    times, time = [], rng.uniform(0.0, min(8.0, seconds / 2))
    while time < seconds - 0.5:
        stop = time + rng.uniform(3.0, 7.0)
        times.append((round(time, 3), round(stop, 3) if stop < seconds else None))
        time = stop + 3.0 + rng.exponential(9.0)  # 3 s: it must have coasted down
    return times


# ---------------------------------------------------------------------------------------------------------------------
# Motion: what every component's sound is a function of
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Motion:
    """An event at the audio rate; every array is (samples,)."""

    turns: np.ndarray  # shaft angle in revolutions, float64
    drive: np.ndarray  # speed / nominal speed, float32
    load: np.ndarray  # 0 to 1, float32
    powered: np.ndarray  # 1 while switched on, float32, with 10 ms edges
    top_hz: float  # the highest shaft rate, for the harmonics' limit

    def __len__(self):
        return len(self.turns)


def motion_of(event, rng):
    """Integrate the event's speed, with 0.15 % of random wander (belts and governors aren't perfect)."""
    samples = round((event["end"] - event["start"]) * SAMPLE_RATE)
    points = samples // CONTROL_HOP + 2
    times = event["start"] + np.arange(points) * CONTROL_HOP / SAMPLE_RATE
    speed = lagged_curve(event, "speed_hz", times)
    wandering = speed * (1 + 0.0015 * slow_wander(rng, points, 0.2))
    coast = event["phases"][-1] if event["phases"][-1]["kind"] == "coast_down" else None
    power_off = coast["start"] if coast else np.inf
    return Motion(
        turns=np.cumsum(to_audio_rate(wandering, samples)) / SAMPLE_RATE,
        drive=to_audio_rate(speed / event["speed_hz"], samples).astype(np.float32),
        load=to_audio_rate(lagged_curve(event, "load", times), samples).astype(np.float32),
        powered=to_audio_rate(np.clip((power_off - times) / 0.01, 0, 1), samples).astype(np.float32),
        top_hz=wandering.max(),
    )


def impulses(motion, angles, strengths):
    """(samples,) train of impulses where the shaft passes `angles` (n,), in turns, sorted.

    Each is split over two samples: whole samples alone would jitter by 60 us, heard as noise.
    """
    first, last = motion.turns[0], motion.turns[-1]
    inside = (angles > first) & (angles < last)
    position = np.interp(angles[inside], motion.turns, np.arange(len(motion)))
    left = position.astype(np.int64)
    share, strength = position - left, strengths[inside]
    train = np.bincount(left, (1 - share) * strength, len(motion) + 1)
    train += np.bincount(left + 1, share * strength, len(motion) + 1)
    return train[: len(motion)].astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# The six components. Each returns (samples,) float32.
# `individual` draws what belongs to the machine, `rng` what belongs to this moment.
# ---------------------------------------------------------------------------------------------------------------------


def render_motor(event, motion, individual, rng):
    """Induction motor: magnetic hum at 2x line frequency and rotor slot harmonics at slots x shaft rate +- 2x line.

    Magnetic forces go with the square of the field, hence 2x line; they vanish the moment the power is off, while the
    rotor still turns. The field rotates `slip` faster than the rotor. (Vandevelde & Melkebeek, IEE Proc. B, 1994.)
    """
    geometry, slots = event["geometry"], event["geometry"]["rotor_slots"]
    if geometry["on_inverter"]:
        line_cycles = motion.turns * geometry["pole_pairs"] / (1 - geometry["slip"])
        top_line = motion.top_hz * geometry["pole_pairs"] / (1 - geometry["slip"])
    else:
        line_cycles = np.arange(len(motion)) * (geometry["line_hz"] / SAMPLE_RATE)
        top_line = geometry["line_hz"]
    hum = falling_harmonics(individual, harmonics_below_nyquist(2 * top_line, 24), individual.uniform(5, 10))
    hum[0] *= 2
    hum = play(wavetable(hum, individual), 2 * line_cycles)
    slot = falling_harmonics(individual, harmonics_below_nyquist(slots * motion.top_hz + 2 * top_line, 3), 6.0)
    slot = play(wavetable(slot, individual), slots * motion.turns)
    beat = 1 + individual.uniform(0.5, 1.2) * np.cos(4 * np.pi * line_cycles).astype(np.float32)
    slot_gain = from_db(individual.uniform(-8, 2)).astype(np.float32)
    inrush = 1.5 * (1 - np.clip(motion.drive, 0, 1))
    return motion.powered * ((0.6 + 0.6 * motion.load + inrush) * hum + slot_gain * motion.load * beat * slot)


def pressure_cycle(ratio, clearance, exponent=1.3, points=2048):
    """One turn of an ideal reciprocating compressor: cylinder pressure (points,), and the angles (4,) of its valves.

    Angles are in turns, top dead centre is 0. Down-stroke: the trapped gas expands, then suction at pressure 1;
    up-stroke: polytropic compression p V^n = const, then discharge at pressure `ratio`. Each valve opens where the
    polytrope meets its pressure and closes at a dead centre.
    """
    angle = np.arange(points) / points
    volume = clearance + (1 - np.cos(2 * np.pi * angle)) / 2
    expansion = np.maximum(ratio * (clearance / volume) ** exponent, 1.0)
    compression = np.minimum(((clearance + 1) / volume) ** exponent, ratio)
    pressure = np.where(angle < 0.5, expansion, compression)
    suction_opens = np.argmax(expansion <= 1.0) / points
    discharge_opens = 0.5 + np.argmax(compression[points // 2 :] >= ratio) / points
    return pressure, np.array([0.0, suction_opens, 0.5, discharge_opens])


def render_compressor(event, motion, individual, rng):
    """Reciprocating compressor: sound pressure follows the gas's dp/dt, valve plates strike their seats, gas hisses.

    Cylinders are spread evenly over the turn, but are never quite alike, so the cycle is one turn for any number.
    """
    cylinders, ratio = event["geometry"]["cylinders"], event["geometry"]["pressure_ratio"]
    pressure, valves = pressure_cycle(ratio, individual.uniform(0.04, 0.12))
    inequality = individual.uniform(0.8, 1.2, cylinders)
    offsets = np.arange(cylinders) / cylinders
    shifts = np.round(offsets * len(pressure)).astype(int)
    in_turn = sum(k * np.roll(pressure, shift) for k, shift in zip(inequality, shifts))
    harmonics = harmonics_below_nyquist(motion.top_hz, individual.integers(20, 120))
    pulses = play(band_limited(np.gradient(in_turn), harmonics), motion.turns)
    gate = play(np.repeat(in_turn, TABLE_SIZE // len(in_turn)).astype(np.float32), motion.turns)
    hiss = unit_power(noise(rng, len(motion)) * gate)

    strikes = (offsets[:, None] + valves).ravel() % 1.0
    forces = np.outer(inequality, individual.uniform(0.1, 1.0, 4)).ravel()
    order = np.argsort(strikes)
    turns = np.arange(int(motion.turns[-1]) + 1)[:, None]
    angles, forces = (turns + strikes[order]).ravel(), np.tile(forces[order], len(turns))
    forces = forces * rng.uniform(0.7, 1.3, len(forces))
    modes = (
        log_uniform(individual, 700, 6000, 4),
        log_uniform(individual, 0.001, 0.006, 4),
        individual.uniform(0.2, 1, 4),
    )
    clicks = unit_power(filtered(impulses(motion, angles, forces), ringing(*modes)))
    gains = from_db(individual.uniform([-2, -10, -18], [2, -2, -10])).astype(np.float32)
    return (0.4 + motion.load) * gains[0] * pulses + gains[1] * clicks + gains[2] * motion.load * hiss


def render_fan(event, motion, individual, rng):
    """Fan: every blade pushes a pulse, at blades x shaft rate; turbulence swells with the pulses.

    No two blades are alike in spacing and lift, which puts weaker lines at all multiples of the shaft rate.
    """
    blades = event["geometry"]["blades"]
    angle = np.arange(4096) / 4096
    centres = (np.arange(blades) + 0.06 * individual.standard_normal(blades)) / blades
    heights = 1 + 0.15 * individual.standard_normal(blades)
    distance = (angle[:, None] - centres + 0.5) % 1.0 - 0.5
    width = individual.uniform(0.08, 0.25) / blades
    blade_pulses = (heights * np.exp(-0.5 * (distance / width) ** 2)).sum(axis=1)
    pulse = play(band_limited(blade_pulses, harmonics_below_nyquist(motion.top_hz, 10 * blades)), motion.turns)
    depth = individual.uniform(0.25, 0.6)
    turbulence = noise(rng, len(motion)) * (1 + depth * pulse)
    tonal_gain = from_db(individual.uniform(-5, 2)).astype(np.float32)
    return (0.6 + 0.6 * motion.load) * tonal_gain * pulse + motion.drive * unit_power(turbulence)


def render_pump(event, motion, individual, rng):
    """Centrifugal pump: tone at vanes x shaft rate, steady flow noise, and bursts of cavitation.

    Bubbles collapse at random, most of them as a vane passes: a Poisson process whose rate follows the vanes.
    """
    vanes = event["geometry"]["vanes"]
    tone = falling_harmonics(individual, harmonics_below_nyquist(vanes * motion.top_hz, 8), individual.uniform(3, 9))
    tone[0] *= 1.5
    tone = play(wavetable(tone, individual), vanes * motion.turns)
    flow = noise(rng, len(motion))

    bursting = slow_wander(rng, len(motion) // CONTROL_HOP + 2, 0.15) > individual.uniform(-0.2, 0.9)
    bursting = to_audio_rate(bursting.astype(float), len(motion)) * (motion.drive > 0.5)
    collapses = individual.uniform(150, 900) / SAMPLE_RATE * bursting
    collapses = collapses * np.clip(1 + np.cos(2 * np.pi * vanes * motion.turns), 0, None)
    hits = np.flatnonzero(rng.random(len(motion), dtype=np.float32) < collapses)
    crackle = np.zeros(len(motion), dtype=np.float32)
    crackle[hits] = rng.exponential(1.0, len(hits)) * rng.choice([-1.0, 1.0], len(hits))
    modes = (
        log_uniform(individual, 900, 7000, 3),
        log_uniform(individual, 0.0003, 0.0015, 3),
        individual.uniform(0.3, 1, 3),
    )
    crackle = unit_power(filtered(crackle, ringing(*modes)))
    gains = from_db(individual.uniform([-2, -10, -4], [2, -5, 2])).astype(np.float32)
    return (0.5 + 0.7 * motion.load) * gains[0] * tone + motion.drive * gains[1] * flow + gains[2] * crackle


def render_bearing(event, motion, individual, rng):
    """Damaged bearing: one impact per roller over the damage, 1 % slip, each ringing the structure at 2 to 6 kHz.

    An inner race's damage turns with the shaft through the load zone, so its impacts swell once per turn; an outer
    race's stands still, its impacts vary little. (Randall & Antoni 2011; load zone as in Stribeck's distribution.)
    """
    geometry, order = event["geometry"], event["geometry"]["impacts_per_turn"]
    count = int(motion.turns[-1] * order * 1.05) + 2
    spacing = np.maximum(1 + 0.01 * rng.standard_normal(count), 0.5) / order
    angles = np.cumsum(spacing)
    zone = np.clip(0.35 + 0.65 * np.cos(2 * np.pi * angles), 0, None) ** 1.5
    depth = 0.9 if geometry["race"] == "inner" else 0.25
    forces = (1 - depth + depth * zone) * rng.uniform(0.6, 1.4, count)
    modes = (
        log_uniform(individual, 2000, 6000, 3),
        log_uniform(individual, 0.0006, 0.003, 3),
        individual.uniform(0.2, 1, 3),
    )
    impacts = unit_power(filtered(impulses(motion, angles, forces), ringing(*modes)))
    rolling = noise(rng, len(motion))
    rolling_gain = from_db(individual.uniform(-14, -7)).astype(np.float32)
    return (0.5 + motion.load) * impacts + motion.drive * rolling_gain * rolling


def render_gear(event, motion, individual, rng):
    """Gear pair: mesh tone at teeth x shaft rate, modulated in amplitude and phase once per turn of either wheel.

    Eccentric wheels vary both depth and timing of the mesh, hence sidebands at both shaft rates (McFadden 1986). Some
    pairs have one bad tooth that strikes once per turn.
    """
    teeth = event["geometry"]["teeth"]
    pinion, wheel = motion.turns, motion.turns * teeth / event["geometry"]["wheel_teeth"]
    swing = [np.cos(2 * np.pi * (turns + individual.uniform())).astype(np.float32) for turns in (pinion, wheel)]
    depth, bend = individual.uniform(0.15, 0.5, 2), individual.uniform(0.02, 0.08, 2)
    mesh_cycles = teeth * motion.turns + bend[0] * swing[0] + bend[1] * swing[1]
    harmonics = falling_harmonics(
        individual, harmonics_below_nyquist(teeth * motion.top_hz * 1.05, 6), individual.uniform(2, 7)
    )
    mesh = play(wavetable(harmonics, individual), mesh_cycles) * (1 + depth[0] * swing[0] + depth[1] * swing[1])
    modes = (
        log_uniform(individual, 800, 5500, 3),
        log_uniform(individual, 0.001, 0.004, 3),
        individual.uniform(0.2, 1, 3),
    )
    strike_gain = from_db(individual.uniform(-12, -4)) if individual.uniform() < 0.4 else 0.0
    sound = (0.4 + 0.9 * motion.load) * mesh
    if strike_gain:
        turns = np.arange(int(motion.turns[-1]) + 1) + individual.uniform()
        strikes = impulses(motion, turns, rng.uniform(0.5, 1.5, len(turns)))
        sound = sound + np.float32(strike_gain) * unit_power(filtered(strikes, ringing(*modes)))
    return sound.astype(np.float32)


RENDER = {
    "motor": render_motor,
    "compressor": render_compressor,
    "fan": render_fan,
    "pump": render_pump,
    "bearing": render_bearing,
    "gear": render_gear,
}


def render_event(machine, event, rng, fault=None):
    """The sound of one run at 1 m: (samples,) float32, power about 1 while it runs at its nominal speed.

    Every machine also has what all rotating machines share, so that these parts tell nothing: harmonics of its shaft
    rate (imbalance, misalignment, looseness) and friction noise. The body's resonances stay where they are while the
    orders sweep through them. A fault (sound, event, motion, rng) -> sound is in the machine, hence before its body,
    and leaves the power as it is.
    """
    individual, motion = np.random.default_rng(machine.seed), motion_of(event, rng)
    characteristic = RENDER[machine.component](event, motion, individual, rng)
    rotation = falling_harmonics(individual, harmonics_below_nyquist(motion.top_hz, 40), individual.uniform(4, 9))
    rotation = play(wavetable(rotation, individual), motion.turns)
    gains = from_db(individual.uniform([-24, -30], [-12, -18])).astype(np.float32)
    sound = unit_power(characteristic) + gains[0] * rotation + gains[1] * noise(rng, len(motion))
    if fault is not None:
        sound = fault(unit_power(sound), event, motion, rng)
    sound = filtered(sound, body_response(individual))
    law = individual.uniform(1.2, 2.2)  # sound power grows with the 2nd to 5th power of speed, depending on its source
    sound = unit_power(sound) * motion.drive**law
    edge = min(len(sound), round(0.02 * SAMPLE_RATE))
    sound[-edge:] *= np.linspace(1, 0 if event["phases"][-1]["kind"] == "coast_down" else 1, edge, dtype=np.float32)
    return sound


# ---------------------------------------------------------------------------------------------------------------------
# From the machine to the microphone
# ---------------------------------------------------------------------------------------------------------------------


def body_response(individual):
    """Housing and mounting: a direct part and four to eight resonances anywhere from 150 Hz to 6 kHz."""
    count = individual.integers(4, 9)
    frequencies = log_uniform(individual, 150, 6000, count)
    decays = individual.uniform(4, 20, count) / (np.pi * frequencies)  # quality factor / (pi f)
    response = ringing(frequencies, decays, from_db(individual.uniform(-12, 0, count)))
    response *= from_db(individual.uniform(-20, -6)).astype(np.float32)
    response[0] += 1.0
    return response


def distance_response(metres):
    """Gain 1/r and a one-pole low-pass that closes with the distance (air, and what stands in the way)."""
    cutoff = 12000.0 / metres
    pole = np.exp(-2 * np.pi * cutoff / SAMPLE_RATE)
    return ((1 - pole) * pole ** np.arange(48) / metres).astype(np.float32)


def room_response(rng):
    """Diffuse field of a room: decaying noise of energy 1; high frequencies decay faster. RT60 0.15 to 0.9 s."""
    reverberation = log_uniform(rng, 0.15, 0.9)
    samples = int(0.7 * reverberation * SAMPLE_RATE)
    time = np.arange(samples) / SAMPLE_RATE
    low = filtered(noise(rng, samples), np.full(8, 1 / 8, dtype=np.float32)) * np.exp(-6.9 * time / reverberation)
    bright = noise(rng, samples) * np.exp(-6.9 * time / (reverberation * rng.uniform(0.3, 0.7)))
    response = low + rng.uniform(0.1, 0.5) * bright
    response[: round(0.002 * SAMPLE_RATE)] = 0.0  # the first reflection travels further than the direct sound
    return (response / np.linalg.norm(response)).astype(np.float32)


def tilt_response(decibels_per_octave, taps=511):
    """Symmetric filter (taps,) that rises by so many dB per octave around 1 kHz, flat below 60 Hz."""
    frequencies = np.fft.rfftfreq(taps + 1, 1 / SAMPLE_RATE)
    gain = from_db(decibels_per_octave * np.log2(np.maximum(frequencies, 60.0) / 1000.0))
    response = np.roll(np.fft.irfft(gain), taps // 2)[:taps] * np.hanning(taps)
    return response.astype(np.float32)


def clank(rng, samples):
    """Metal on metal: one to three hits on inharmonic modes."""
    modes = log_uniform(rng, 250, 5500, 6), log_uniform(rng, 0.02, 0.2, 6), rng.uniform(0.1, 1, 6)
    hits = np.zeros(samples, dtype=np.float32)
    hits[rng.integers(0, max(1, samples // 2), rng.integers(1, 4))] = 1.0
    return filtered(hits, ringing(*modes))


def vehicle(rng, samples):
    """A passing vehicle: low rumble that swells and fades."""
    rumble = filtered(noise(rng, samples), np.hanning(int(rng.integers(60, 200))).astype(np.float32))
    return rumble * np.hanning(samples).astype(np.float32) ** 2


def air_release(rng, samples):
    """Compressed air let off: a hiss that decays."""
    return noise(rng, samples) * np.exp(-np.arange(samples) / (samples * rng.uniform(0.1, 0.3))).astype(np.float32)


NON_MACHINE_SECONDS = {clank: (0.5, 1.5), vehicle: (2.0, 6.0), air_release: (0.3, 1.5)}


def background(rng, samples):
    """Coloured noise of power about 1 that drifts by some dB within seconds, and now and then something happens."""
    sound = oaconvolve(noise(rng, samples), tilt_response(rng.uniform(-4.5, -2.5)), mode="same")
    drift = from_db(2.0 * slow_wander(rng, samples // CONTROL_HOP + 2, 1.5))
    sound = unit_power(sound) * to_audio_rate(drift, samples).astype(np.float32)
    for _ in range(rng.poisson(samples / SAMPLE_RATE / 15.0)):
        happening = list(NON_MACHINE_SECONDS)[rng.integers(len(NON_MACHINE_SECONDS))]
        length = int(rng.uniform(*NON_MACHINE_SECONDS[happening]) * SAMPLE_RATE)
        start = int(rng.integers(0, samples))
        part = unit_power(happening(rng, length)) * from_db(rng.uniform(0, 10)).astype(np.float32)
        sound[start : start + length] += part[: samples - start]
    return sound


def record(schedule, seconds, rng, shifted=False):
    """Render a schedule [(machine, event), ...] as one microphone hears it: (samples,) float32, never clipped."""
    samples = round(seconds * SAMPLE_RATE)
    direct, diffuse, running = np.zeros(samples, np.float32), np.zeros(samples, np.float32), np.zeros(samples, bool)
    places = {}  # a machine stays where it is
    for machine, event in schedule:
        metres, enclosure_db = places.setdefault(machine.seed, (log_uniform(rng, 0.5, 3.0), rng.uniform(-4, 4)))
        sound = render_event(machine, event, rng) * from_db(enclosure_db).astype(np.float32)
        begin = round(event["start"] * SAMPLE_RATE)
        sound = sound[: samples - begin]
        direct[begin : begin + len(sound)] += filtered(sound, distance_response(metres))
        diffuse[begin : begin + len(sound)] += sound  # the diffuse field is the same everywhere in the room
        running[begin : begin + len(sound)] = True
    machines = direct + from_db(rng.uniform(-20, -8)).astype(np.float32) * filtered(diffuse, room_response(rng))
    signal_to_noise = rng.uniform(15.0, 28.0) - (rng.uniform(6.0, 10.0) if shifted else 0.0)
    power = np.mean(machines[running] ** 2)
    around = background(rng, samples) * np.float32(np.sqrt(power) * from_db(-signal_to_noise))
    heard = oaconvolve(machines + around, tilt_response(rng.uniform(-0.8, 0.8)), mode="same")
    heard = unit_power(heard) * from_db(rng.uniform(-34, -20))
    return (heard * min(1.0, 0.95 / np.abs(heard).max())).astype(np.float32)


def synthesize_clip(component, rng, seconds=4.0, shifted=False):
    """A clip in which one machine is switched on for at least half of the time.

    Args:
        component: one of COMPONENTS.
        rng: numpy Generator; the clip is a function of its state alone.
        seconds: length.
        shifted: the other regime: speeds outside of SPEED_RANGES and 6 to 10 dB more noise.

    Returns:
        waveform (samples,) float32 at SAMPLE_RATE, and its timeline {"duration": seconds, "events": [event]}.
    """
    machine, event = draw_clip_event(component, rng, seconds, shifted)
    return record([(machine, event)], seconds, rng, shifted), {"duration": seconds, "events": [event]}


def synthesize_mixture(rng, seconds=4.0):
    """A clip with one to four components at once: each is switched on for at least half of it, and all in its middle.

    How many follows about how often so many of the plant's six run at once. Returns what `synthesize_clip` returns.
    """
    count = rng.choice([1, 2, 3, 4], p=[0.3, 0.35, 0.25, 0.1])
    components = [COMPONENTS[number] for number in sorted(rng.choice(len(COMPONENTS), count, replace=False))]
    schedule = [draw_clip_event(component, rng, seconds) for component in components]
    return record(schedule, seconds, rng), {"duration": seconds, "events": [event for _, event in schedule]}


def synthesize_recording(rng, seconds=60.0, shifted=False):
    """A longer recording of one machine of each component, each on a timeline of its own.

    They come and go: at a given moment none, one or several run. Returns what `synthesize_clip` returns.
    """
    schedule = draw_schedule(rng, seconds, shifted)
    waveform = record(schedule, seconds, rng, shifted)
    return waveform, {"duration": seconds, "events": [event for _, event in schedule]}

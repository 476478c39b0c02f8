"""Recordings to windows: (row, start, stop) in the recording's own frames. Each task says which windows it wants."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from acoustic.data.headers import Header, Skip, read_header


@dataclass(frozen=True)
class Window:
    """A piece [start, stop) of a recording, in frames at its own rate; `row` stays undecoded."""

    row: dict
    start: int
    stop: int
    rate: int

    @property
    def seconds(self) -> float:
        return (self.stop - self.start) / self.rate


# (row, header, generator) -> its windows; raises Skip when the recording can't be used.
Plan = Callable[[dict, Header, np.random.Generator], list[Window]]


def cover(min_seconds: float, max_seconds: float) -> Plan:
    """Windows of equal length that cover all of a recording, none longer than `max_seconds`.

    Equal lengths leave no short rest to be dropped: 16 s at a limit of 15 s becomes 8 s + 8 s.
    """

    def plan(row: dict, header: Header, generator: np.random.Generator) -> list[Window]:
        refuse_short(header, min_seconds)
        count = math.ceil(header.frames / int(max_seconds * header.rate + 1e-6))
        edges = [index * header.frames // count for index in range(count + 1)]
        return [Window(row, start, stop, header.rate) for start, stop in zip(edges, edges[1:])]

    return plan


def crop(min_seconds: float, max_seconds: float, random: bool) -> Plan:
    """One window per recording, for labels that hold for all of it; at a random place in training, else the middle."""

    def plan(row: dict, header: Header, generator: np.random.Generator) -> list[Window]:
        refuse_short(header, min_seconds)
        length = min(header.frames, int(max_seconds * header.rate))
        spare = header.frames - length
        start = int(generator.integers(spare + 1)) if random else spare // 2
        return [Window(row, start, start + length, header.rate)]

    return plan


def whole(min_seconds: float, max_seconds: float) -> Plan:
    """The whole recording or none of it, for labels that can't be cut (transcripts)."""

    def plan(row: dict, header: Header, generator: np.random.Generator) -> list[Window]:
        refuse_short(header, min_seconds)
        if header.seconds > max_seconds:
            raise Skip(f"{header.seconds:.1f} s is longer than max_duration_in_seconds={max_seconds:g}")
        return [Window(row, 0, header.frames, header.rate)]

    return plan


def usable(plan: Plan) -> Callable[[dict], bool]:
    """row -> whether its header can be read and the plan finds windows in it."""

    def is_usable(row: dict) -> bool:
        try:
            return bool(plan(row, read_header(row["audio"]), np.random.default_rng(0)))
        except Skip:
            return False

    return is_usable


def refuse_short(header: Header, min_seconds: float) -> None:
    if header.seconds < min_seconds:
        raise Skip(f"{header.seconds:.2f} s is shorter than min_duration_in_seconds={min_seconds:g}")

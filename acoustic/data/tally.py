"""What was skipped and why, counted: the content of data_report.json, and whether it is too much to go on."""

import hashlib
import re
import sys
from collections import Counter
from dataclasses import dataclass, field

from acoustic.console import UserError

MAX_LISTED = 1000


@dataclass
class Tally:
    """Recordings that could not be used, or not all of it: all are counted, the first MAX_LISTED listed.

    `rows` and `faults` are counted once per recording and epoch, to be compared; `names` holds each recording once:
    a hash of its name, and the kind of its reason.
    """

    rows: int = 0
    faults: int = 0
    fault_reasons: Counter = field(default_factory=Counter)
    names: dict[bytes, str] = field(default_factory=dict)
    listed: dict[str, str] = field(default_factory=dict)
    reasons: Counter = field(default_factory=Counter)
    faulty: dict[bytes, int] = field(default_factory=dict)  # -> the last epoch in which it was a fault

    def add(self, skipped: list, rows: int = 0) -> None:
        """`skipped`: (name, reason, fault, epoch) of each; see `order.Skipped`."""
        self.rows += rows
        for name, reason, fault, epoch in skipped:
            kind = sys.intern(reason_kind(reason))
            if fault and self.faulty.get(digest(name), -1) < epoch:  # one fault, however many of its windows fail
                self.faulty[digest(name)] = epoch
                self.faults += 1
                self.fault_reasons[kind] += 1
            if digest(name) not in self.names:
                self.names[digest(name)] = kind
                self.reasons[kind] += 1
                if len(self.listed) < MAX_LISTED:
                    self.listed[name] = reason

    def merge(self, other: "Tally") -> None:
        """Add what another process or source counted; a recording that both met is named once."""
        self.rows, self.faults = self.rows + other.rows, self.faults + other.faults
        self.fault_reasons.update(other.fault_reasons)
        new = {key: kind for key, kind in other.names.items() if key not in self.names}
        self.names |= new
        self.reasons.update(new.values())
        self.listed = dict(list({**self.listed, **other.listed, **self.listed}.items())[:MAX_LISTED])

    def state_dict(self) -> dict:
        """A JSON value that a checkpoint keeps."""
        counters = {"fault_reasons": dict(self.fault_reasons), "reasons": dict(self.reasons)}
        names = {name.hex(): kind for name, kind in self.names.items()}
        return {"rows": self.rows, "faults": self.faults, "listed": self.listed, "names": names, **counters}

    def load_state_dict(self, state: dict) -> None:
        self.rows, self.faults, self.listed = state["rows"], state["faults"], dict(state["listed"])
        self.fault_reasons, self.reasons = Counter(state["fault_reasons"]), Counter(state["reasons"])
        self.names = {bytes.fromhex(name): sys.intern(kind) for name, kind in state["names"].items()}

    def report(self) -> dict:
        return {
            "skipped": len(self.names),
            "skipped_by_reason": dict(self.reasons.most_common(50)),
            "skipped_recordings": dict(sorted(self.listed.items())),
        }


def digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def reason_kind(reason: str) -> str:
    """A reason without the recording's own numbers, so that alike ones are counted together."""
    reason = re.sub(r"^[\d.]+ s is ", "", re.sub(r" \(at \d+ s\)$", "", reason))
    words, setting, value = reason.partition("=")
    # A number before a capital is an HTTP status: "503 Service Unavailable".
    return re.sub(r"\b\d[\d.]*\b(?! [A-Z])", "#", words) + setting + value


def most_common(reasons: Counter) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in reasons.most_common(3))


def refuse_too_many(faults: int, rows: int, reasons: Counter, max_fraction: float, description: str) -> None:
    """End the run when more than `max_fraction` of the rows can't be used: then something else is wrong.

    Raises:
        UserError: the share, and the reasons that dominate.
    """
    if rows and faults > max_fraction * rows:
        raise UserError(
            f"max_skipped_fraction: {faults} of {rows} rows of {description!r} can't be used, {faults / rows:.0%} and "
            f"more than {max_fraction:.0%}: {most_common(reasons)}; mend them, or raise --max_skipped_fraction"
        )

"""The held-out part of the audio: by recording, by a hash of its name, so that it never moves and never leaks."""

import hashlib
from collections.abc import Callable

from acoustic.data.rows import IndexedRows, Rows


def hold_out(
    rows: Rows, percentage: float, usable: Callable[[dict], bool] = lambda row: True
) -> tuple[Rows, Rows | None]:
    """(training rows, held-out rows): by recording, by a hash of its name, so that it never moves and never leaks.

    Where no usable recording's hash falls under the percentage, the usable one with the smallest hash is held out. A
    single usable recording can't be divided: then there is no held-out part (None).
    """
    if percentage <= 0:
        return rows, None
    threshold = percentage / 100
    if not isinstance(rows, IndexedRows):
        return rows.select(lambda row: unit_hash(row["name"]) >= threshold), rows.select(
            lambda row: unit_hash(row["name"]) < threshold
        )
    hashes = [unit_hash(rows[index]["name"]) for index in range(len(rows))]
    by_hash = sorted(range(len(hashes)), key=hashes.__getitem__)
    held_out = {index for index in by_hash if hashes[index] < threshold}
    if not any(usable(rows[index]) for index in sorted(held_out)):
        held_out.update(next(([index] for index in by_hash if usable(rows[index])), []))
    if len(held_out) == len(hashes):
        held_out.discard(by_hash[-1])
    training = [index for index in range(len(hashes)) if index not in held_out]
    if not held_out or not any(usable(rows[index]) for index in training):
        return rows, None
    return rows.take(training), rows.take(sorted(held_out))


def unit_hash(name: str) -> float:
    """A name's hash as a number in [0, 1), the same on every machine."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64

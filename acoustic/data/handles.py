"""Long mp3 files that stay open between two windows.

An mp3 has no index: libsndfile finds a place by walking the frames from the start, 50 us for a second of audio, but
once only while the file is open. Every process keeps a few of them. The price: mpg123 adds up in an order that depends
on what it decoded before, so a sample can differ in its last bit (1e-7) from that of a file that was opened anew.
"""

import os
from collections import OrderedDict

import soundfile

KEPT_OPEN = 16
MIN_SECONDS = 600  # a shorter walk is not worth a file descriptor

_kept: OrderedDict[tuple, soundfile.SoundFile] = OrderedDict()


def identity(path: bytes) -> tuple:
    """Of the file's content, and of the process: after a fork, both would move the position of the same open file."""
    about = os.stat(path)
    return os.getpid(), path, about.st_mtime_ns, about.st_size


def take(path: bytes) -> soundfile.SoundFile | None:
    """The file if it is open; it is the caller's until it is kept again."""
    return _kept.pop(identity(path), None) if _kept else None


def keep(path: bytes, file) -> bool:
    """Whether the file stays open; if not, the caller closes it."""
    if file.format != "MP3" or file.frames < MIN_SECONDS * file.samplerate:
        return False
    _kept[identity(path)] = file
    while len(_kept) > KEPT_OPEN:
        _kept.popitem(last=False)[1].close()
    return True

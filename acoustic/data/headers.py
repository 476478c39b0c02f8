"""What a row's audio header says, without decoding it."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import fsspec
import soundfile

# What a folder is searched for. The first line is read by soundfile alone; nothing else needs to be installed.
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64", ".rf64")


class Skip(Exception):
    """A row that can't be used. `str(skip)` is the reason that data_report.json shows."""


@dataclass(frozen=True)
class Header:
    """Length in frames (samples per channel), rate in Hz, channel count."""

    frames: int
    rate: int
    channels: int

    @property
    def seconds(self) -> float:
        return self.frames / self.rate


def open_audio(audio: dict) -> soundfile.SoundFile:
    """Open an undecoded `{"path", "bytes"}` value (what `datasets.Audio(decode=False)` gives). Raises `Skip`."""
    path, content = audio.get("path"), audio.get("bytes")
    if content is None and path is None:
        raise Skip("no audio in the row")
    try:
        if content is None and "://" in path:
            with fsspec.open(path, "rb") as remote:
                content = remote.read()
        if content is not None:
            if len(content) == 0:
                raise Skip("empty file")
            return soundfile.SoundFile(io.BytesIO(content))
        if os.path.isdir(path):
            raise Skip("a folder, not a file")
        if os.path.getsize(path) == 0:
            raise Skip("empty file")
        return soundfile.SoundFile(path)
    except FileNotFoundError:
        raise Skip("no such file") from None
    except PermissionError:
        raise Skip("permission denied") from None
    except (soundfile.LibsndfileError, RuntimeError, OSError, TypeError) as error:
        # libsndfile repeats the path ("Error opening 'x': ..."); the report names it already.
        reason = str(error).rsplit(": ", 1)[-1].strip().rstrip(".")
        raise Skip(f"not readable as audio: {reason}") from None


def read_header(audio: dict) -> Header:
    """The header of one undecoded audio value. Raises `Skip` with the reason when there is no usable audio."""
    with open_audio(audio) as file:
        header = Header(frames=file.frames, rate=file.samplerate, channels=file.channels)
    if header.frames <= 0:
        raise Skip("no samples in the file")
    if header.rate <= 0:
        raise Skip(f"absurd sample rate: {header.rate} Hz")
    return header


def is_audio_name(name: str) -> bool:
    return Path(name).suffix.lower() in AUDIO_SUFFIXES

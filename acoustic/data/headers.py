"""What a row's audio header says, without decoding it; and every way in which a row can be unusable."""

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import soundfile

from acoustic.data import ffmpeg, handles
from acoustic.data.remote import RemoteFile, is_remote

# What a folder is searched for: what libsndfile reads, and what FFmpeg does.
SOUNDFILE_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64", ".rf64"),
)
AUDIO_SUFFIXES = SOUNDFILE_SUFFIXES + ffmpeg.SUFFIXES

# A header beyond these is taken for damage. The most compact audio there is, FLAC of a constant, has some 5,000 frames
# in a byte; what claims more would be hours of windows that can't be read.
MAX_FRAMES_PER_BYTE = 8192
MIN_RATE, MAX_RATE = 100, 4_000_000
MAX_CHANNELS = 256


class Skip(Exception):
    """A row that can't be used. `str(skip)` is the reason that data_report.json shows.

    `fault` is False where the row is as it should be and the settings leave it out (too short, too long).
    """

    def __init__(self, reason: str, fault: bool = True):
        super().__init__(reason)
        self.fault = fault


class Silent(Skip):
    """Nothing is to be heard in a window."""


@dataclass(frozen=True)
class Header:
    """Length in frames (samples per channel), rate in Hz, channel count."""

    frames: int
    rate: int
    channels: int

    @property
    def seconds(self) -> float:
        return self.frames / self.rate


def read_header(audio: dict) -> Header:
    """The header of one undecoded audio value. Raises `Skip` with the reason when there is no usable audio."""
    with open_audio(audio) as file:
        return Header(frames=file.frames, rate=file.samplerate, channels=file.channels)


@contextlib.contextmanager
def open_audio(audio: dict) -> Iterator[soundfile.SoundFile | ffmpeg.FFmpegFile]:
    """Open an undecoded audio value; whatever goes wrong then, here or inside of the block, becomes a `Skip`.

    Args:
        audio: {"path", "bytes"}, what `datasets.Audio(decode=False)` gives. A path may be a URL, and with {"offset",
            "size"} the audio is that part of the file (a member of a tar). {"fault"} is the reason of a broken row.
    """
    doing = "not readable as audio"
    source = None
    try:
        source, size = find_source(audio)
        with open_decoder(source) as file:
            refuse_absurd(file, size)
            doing = "decoding failed"
            yield file
        refuse_unreachable(source)
    except Skip:
        refuse_unreachable(source)
        raise
    except FileNotFoundError:
        raise Skip("no such file") from None
    except PermissionError:
        raise Skip("permission denied") from None
    except (soundfile.LibsndfileError, RuntimeError, OSError, TypeError, ValueError) as error:
        refuse_unreachable(source)
        raise Skip(f"{doing}: {reason_of(error)}") from None
    finally:
        if source is not None and not isinstance(source, bytes):
            source.close()


# What libsndfile says of a file whose first bytes it doesn't know, and of one without a sample rate.
IN_PLAIN_WORDS = {
    "File does not exist or is not a regular file (possibly a pipe?)": "Format not recognised",
    "SF_INFO struct incomplete": "no sample rate or no channels in the header",
}


def reason_of(error: Exception) -> str:
    reason = str(error).strip().rstrip(".")
    if isinstance(error, soundfile.LibsndfileError):
        # It repeats the path ("Error opening 'x': ..."); the report names it already.
        reason = reason.rsplit(": ", 1)[-1]
    return IN_PLAIN_WORDS.get(reason, reason)


def find_source(audio: dict) -> tuple[bytes | BinaryIO, int]:
    """(a local path as the file system spells it, or a binary file; its size in bytes)."""
    path, content = audio.get("path"), audio.get("bytes")
    if audio.get("fault"):
        raise Skip(audio["fault"])
    if content is None and path is None:
        raise Skip("no audio in the row")
    if content is not None:
        source, size = io.BytesIO(content), len(content)
    elif is_remote(path):
        # Through libsndfile's callbacks no exception comes out: the file keeps it.
        source = RemoteFile(path, keep_errors=True)
        size = source.size
        refuse_unreachable(source)
    else:
        source = os.fsencode(path)
        about = os.stat(source)
        if stat.S_ISDIR(about.st_mode):
            raise Skip("a folder, not a file")
        if not stat.S_ISREG(about.st_mode):
            raise Skip("not a regular file")  # opening a pipe would wait for ever
        size = about.st_size
    if "offset" in audio:
        source, size = FilePart(source, audio["offset"], audio["size"]), audio["size"]
    if size == 0:
        raise Skip("empty file")
    return source, size


@contextlib.contextmanager
def open_decoder(source: bytes | BinaryIO) -> Iterator[soundfile.SoundFile | ffmpeg.FFmpegFile]:
    """A decoder at any place of the file; a long mp3 stays open for the next window."""
    is_path = isinstance(source, bytes)
    file = (handles.take(source) if is_path else None) or new_decoder(source)
    try:
        yield file
    except BaseException:
        file.close()
        raise
    if not (is_path and handles.keep(source, file)):
        file.close()


def new_decoder(source: bytes | BinaryIO) -> soundfile.SoundFile | ffmpeg.FFmpegFile:
    """libsndfile, and FFmpeg for what that doesn't know: it is faster where both can."""
    try:
        return soundfile.SoundFile(source)
    except soundfile.LibsndfileError:
        if not is_media(source):
            raise
    if not isinstance(source, bytes):
        source.seek(0)
    return ffmpeg.FFmpegFile(os.fsdecode(source) if isinstance(source, bytes) else source)


def is_media(source: bytes | BinaryIO) -> bool:
    """Whether the first bytes are those of a container that FFmpeg should try: a text named .wav is none."""
    if isinstance(source, bytes):
        with open(source, "rb") as file:
            start = file.read(16)
    else:
        source.seek(0)
        start = source.read(16)
    mp4, matroska, asf = start[4:8] == b"ftyp", start[:4] == b"\x1aE\xdf\xa3", start[:4] == b"0&\xb2u"
    adts = len(start) > 1 and start[0] == 0xFF and start[1] & 0xF6 == 0xF0
    return mp4 or matroska or asf or adts


def refuse_absurd(file, size: int) -> None:
    """A header is a claim. One that can't be true is a damaged file, not hours of windows."""
    if file.frames <= 0:
        raise Skip("no samples in the file")
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
        raise Skip(f"absurd header: {file.samplerate} Hz")
    if file.channels > MAX_CHANNELS:
        raise Skip(f"absurd header: {file.channels} channels")
    if file.frames > size * MAX_FRAMES_PER_BYTE:
        raise Skip(f"absurd header: {file.frames / file.samplerate / 3600:.3g} h in {size} bytes")


def refuse_unreachable(source) -> None:
    """What looked like the end of the file was the network's failure, if the file kept one."""
    error = getattr(source, "error", None)
    if isinstance(error, FileNotFoundError):
        raise Skip("no such file") from None
    if isinstance(error, PermissionError):
        raise Skip("permission denied") from None
    if error is not None and not isinstance(error, Exception):
        raise error  # Ctrl-C
    if error is not None:
        raise Skip(f"not reachable: {getattr(error, 'strerror', None) or error}") from None


class FilePart(io.RawIOBase):
    """`size` bytes of a larger file from `offset` on, as a file of its own.

    `file`: a path, or an open file that is closed with this one.
    """

    def __init__(self, file: bytes | BinaryIO, offset: int, size: int):
        self.file = open(file, "rb") if isinstance(file, bytes) else file
        self.offset, self.size, self.place = offset, size, 0

    @property
    def error(self):
        return getattr(self.file, "error", None)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = max(offset + (0, self.place, self.size)[whence], 0)
        return self.place

    def readinto(self, buffer) -> int:
        wanted = min(len(buffer), max(self.size - self.place, 0))
        self.file.seek(self.offset + self.place)
        content = self.file.read(wanted)
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


def is_audio_name(name: str) -> bool:
    return Path(name).suffix.lower() in AUDIO_SUFFIXES

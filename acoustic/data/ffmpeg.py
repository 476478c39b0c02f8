"""Windows of the audio that libsndfile does not know (m4a, aac, webm, mka, mp4, wma), through PyAV's own FFmpeg.

PyAV's wheel carries FFmpeg, so nothing of the system is needed; it is imported only when such a file is opened.
"""

import contextlib
import os
from functools import cached_property
from itertools import chain
from typing import BinaryIO

import numpy as np

# What a folder is searched for besides soundfile's formats. Of a video the first audio track is read.
SUFFIXES = (".m4a", ".m4b", ".aac", ".webm", ".mka", ".mp4", ".mov", ".mkv", ".3gp", ".wma")

# A decoder that starts in the middle differs from one that started at the beginning until its past has faded: one
# packet for the overlap of AAC and Vorbis, about a second until nothing is left of it in Opus. It takes milliseconds.
PREROLL_SECONDS = 2.0

BEYOND_THE_END = 2**40  # in frames

# A playlist that calls itself audio.m4a would make FFmpeg open what it names.
NO_OTHER_FILES = {"protocol_whitelist": "none"}

FULL_SCALE = {"u8": 2**7, "s16": 2**15, "s32": 2**31, "s64": 2**63, "flt": 1, "dbl": 1}


class FFmpegError(OSError):
    """The file isn't what it should be. `str(error)` is a short reason, without the path."""


class MissingFFmpeg(FFmpegError):
    """PyAV is not installed."""


class FFmpegFile:
    """The part of `soundfile.SoundFile` that reading windows needs, for what FFmpeg decodes.

    Frames are counted as soundfile does: samples per channel, from the first one that is played. Where the file's
    timestamps leave a hole (a recording that was paused, a packet that was never sent) there are zeros.

    Args:
        source: a path, or a seekable binary file object, which stays open when this is closed.

    Raises:
        OSError: as `open` does.
        MissingFFmpeg: PyAV is not installed.
        FFmpegError: no media, no audio stream, no decoder for it, or no samples in it.
    """

    format = "FFMPEG"

    def __init__(self, source: str | BinaryIO):
        self._av = import_av()
        # Opened here and not by FFmpeg, so that no path is taken for a URL.
        self._owned = open(source, "rb") if isinstance(source, (str, os.PathLike)) else None
        self._file = self._owned or source
        self._container = None
        self._position = 0
        try:
            self._open()
            self._find_clock()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self._container is not None:
            self._container.close()
        if self._owned is not None:
            self._owned.close()

    @cached_property
    def frames(self) -> int:
        """Samples per channel that can be read, found when first asked for.

        In mp4, m4a and mov from the header: the length that was encoded, which may be less than a decode gives. Else
        exact, from decoding the last packet. A seek finds that in webm, mka and wma; raw aac, and a webm without
        duration because it was written live, are walked through, which reads the whole file but decodes nothing.
        """
        stream = self._stream
        if stream.duration and self._tick <= 1 and "mp4" in self._container.format.name:
            return max(0, self._place(stream.start_time or 0) + int(stream.duration * self._tick))
        last = end = self._last_packet()
        try:
            for position, frame in self._frames_from(last):
                end = max(end, position + frame.samples)
        except FFmpegError:
            pass  # whoever reads up to the broken packet is told
        return max(0, end)

    def seek(self, frame: int) -> int:
        """The next `read` starts at this frame. Nothing is decoded yet."""
        if frame < 0:
            raise ValueError(f"seek to frame {frame}, before the start")
        self._position = frame
        return frame

    def read(self, frames: int = -1, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """(frames, channels) float32 in [-1, 1] from the current position on; fewer at the end of the file.

        The same samples whatever the window: Opus within 1e-5, AAC with noise substitution (PNS), HE-AAC and AC-3 but
        for the noise that their decoders make up, everything else exactly.

        Raises:
            FFmpegError: a broken packet in the window, less audio than `frames` says, another rate or channel count
                in mid-stream.
        """
        if dtype != "float32" or not always_2d:
            raise ValueError("only float32 with always_2d=True")
        start = self._position
        stop = self.frames if frames < 0 else min(start + frames, self.frames)
        window = np.zeros((max(stop - start, 0), self.channels), dtype=np.float32)
        reached = start
        for position, frame in self._frames_from(start) if stop > start else ():
            begin, end = max(position, start), min(position + frame.samples, stop)
            if begin < end:
                window[begin - start : end - start] = to_float(frame)[begin - position : end - position]
            reached = min(position + frame.samples, stop)
            if reached == stop:
                break
        if reached < stop:
            raise FFmpegError(f"truncated: {reached} of {stop} frames could be read")
        self._position = max(start, stop)
        return window

    def _open(self):
        """Open the container at its start, with a new decoder; again if need be."""
        if self._container is not None:
            self._container.close()
        self._file.seek(0)
        with self._short_errors():
            self._container = self._av.open(self._file, metadata_errors="replace", options=NO_OTHER_FILES)
        if not self._container.streams.audio:
            raise FFmpegError("no audio stream")
        self._stream = self._container.streams.audio[0]
        if self._stream.codec_context is None:
            raise FFmpegError("no decoder for this audio codec")
        self._stream.codec_context.thread_count = 1  # the data loader's workers are the parallelism
        self._stream.codec_context.options = {"err_detect": "crccheck"}
        for stream in self._container.streams:
            # Pictures aren't even read where there is an index. PyAV can since 18, which needs Python 3.11.
            if stream is not self._stream and hasattr(self._av.stream, "Discard"):
                stream.discard = self._av.stream.Discard.all

    def _find_clock(self):
        """Rate, channels and clock from the first two decoded frames: the headers of HE-AAC have half the rate."""
        frames, error = [], None
        for packet in self._packets():
            try:
                frames += [frame for frame in packet.decode() if frame.samples]
            except self._av.FFmpegError as problem:
                error = problem
            if len(frames) >= 2:
                break
        if not frames:
            raise FFmpegError("no samples in the audio stream" if error is None else reason_of(error))
        first, second = frames[0], frames[min(1, len(frames) - 1)]
        second = first if second.pts is None else second
        if first.pts is None:
            raise FFmpegError("no timestamps")
        self.samplerate, self.channels = second.sample_rate, second.layout.nb_channels
        self._tick = self.samplerate * second.time_base  # samples in one unit of the timestamps
        # The encoder's delay is cut off the first frame, in units that may be coarse; so the second is the reference.
        self._reference = (second.pts, 0 if second is first else first.samples)
        self._grid = self._find_grid(second.samples)

    def _find_grid(self, frame_samples: int) -> int:
        """Every frame starts at a multiple of so many samples (and the start of the reference).

        Needed where timestamps are too coarse for one sample: a millisecond in Matroska, that is 44.1 samples.
        """
        codec = self._stream.codec_context
        if self._tick <= 1:
            return 1
        if codec.name in ("opus", "libopus"):
            return self.samplerate // 400  # packets of n * 2.5 ms
        if codec.name == "vorbis":
            sizes = codec.extradata[codec.extradata.index(b"\x01vorbis") + 28]
            return max(2 ** (sizes & 15) // 4, 1)  # two sizes of blocks, powers of two, half overlapped
        return frame_samples

    def _place(self, pts: int) -> int:
        """The frame that a timestamp stands for."""
        reference_pts, reference = self._reference
        return reference + self._grid * round((pts - reference_pts) * self._tick / self._grid)

    def _seek_to(self, frame: int) -> bool:
        """Go to a packet at or before a frame, with a reset decoder. False where the container can't."""
        reference_pts, reference = self._reference
        try:
            self._container.seek(int(reference_pts + (frame - reference) / self._tick), stream=self._stream)
        except self._av.FFmpegError:
            return False
        return True

    def _last_packet(self) -> int:
        """Where the last packet starts, in frames."""
        container, rate = self._container, self.samplerate
        # The length of a raw stream is FFmpeg's guess from the bit rate; its word for them is "generic index".
        guessed = container.format.flags & self._av.format.Flags.generic_index.value
        ends = [BEYOND_THE_END]  # where there is no index, FFmpeg makes one on the way there
        if container.duration and not guessed:
            end = self._place(0) + round((container.duration + (container.start_time or 0)) * rate / 1e6)
            ends = [end - rate, end - 60 * rate]  # the audio of a video may end before the pictures do
        for end in ends:
            last = self._last_of_the_rest() if end > 0 and self._seek_to(end) else None
            if last is not None:
                return last
        self._open()
        return self._last_of_the_rest() or 0

    def _last_of_the_rest(self) -> int | None:
        last = None
        try:
            for packet in self._packets():
                last = packet.pts if packet.pts is not None else last
        except FFmpegError:
            pass  # a live recording that was cut off ends where it ends
        return None if last is None else self._place(last)

    def _frames_from(self, start: int):
        """Yield (position, decoded frame) without holes of jitter, from the one that holds frame `start` or before."""
        target = start - int(PREROLL_SECONDS * self.samplerate)
        if target > 0 and self._seek_to(target):
            frames = ((own, frame) for own, frame in self._decode(start) if own + frame.samples > start)
            first = next(frames, None)
            if first is None:
                return
            if first[0] <= start + self._slack(first[1]):
                yield from self._consecutive(chain([first], frames), min(first[0], start))
                return
        # At the start, or no way to seek there. Opened anew: after a seek FFmpeg doesn't cut off the encoder's delay.
        self._open()
        yield from self._consecutive(self._decode(start), 0)

    def _consecutive(self, frames, position: int):
        for own, frame in frames:
            ahead = own - position
            if ahead < -self._slack(frame):
                raise FFmpegError("timestamps jump back")
            if ahead > self._slack(frame):
                position += ahead
            yield position, frame
            position += frame.samples

    def _slack(self, frame) -> float:
        """Timestamps of live recordings jitter, so only what misses half a frame or more is a hole."""
        return max(frame.samples / 2, 2 * self._tick)

    def _decode(self, start: int):
        """Yield (position by its timestamp, frame); a broken packet before `start` is only an error next to it."""
        size, end = self._grid, None
        for packet in self._packets():
            try:
                if packet.is_corrupt:
                    raise FFmpegError("it is incomplete")
                frames = packet.decode()
            except (self._av.FFmpegError, FFmpegError) as error:
                if packet.pts is not None and self._place(packet.pts) + 2 * size <= start:
                    continue
                raise FFmpegError(f"broken packet: {reason_of(error)}") from None
            for frame in frames:
                if frame.sample_rate != self.samplerate:
                    raise FFmpegError(f"the sample rate changes from {self.samplerate} to {frame.sample_rate} Hz")
                if frame.layout.nb_channels != self.channels:
                    raise FFmpegError(f"the channels change from {self.channels} to {frame.layout.nb_channels}")
                own = end if frame.pts is None else self._place(frame.pts)  # what a decoder held back has none
                if own is None:
                    raise FFmpegError("no timestamps")
                size, end = max(size, frame.samples), own + frame.samples
                if frame.samples:
                    yield own, frame

    def _packets(self):
        with self._short_errors():
            yield from self._container.demux(self._stream)

    @contextlib.contextmanager
    def _short_errors(self):
        try:
            yield
        except (self._av.FFmpegError, OSError) as error:  # OSError: what a remote file object raises
            raise FFmpegError(reason_of(error)) from None


def import_av():
    try:
        import av
    except ImportError:
        raise MissingFFmpeg("needs PyAV: pip install av") from None
    return av


def reason_of(error: Exception) -> str:
    """FFmpeg's words without the error number and the path that PyAV puts around them."""
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")


def to_float(frame) -> np.ndarray:
    """(frames, channels) float32 in [-1, 1] of a decoded frame in any of FFmpeg's sample formats."""
    samples, kind = frame.to_ndarray(), frame.format.packed.name
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
    if kind == "u8":
        samples = samples.astype(np.int16) - 128
    return samples.astype(np.float32) / np.float32(FULL_SCALE[kind])

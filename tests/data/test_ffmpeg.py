"""A window of an m4a, aac, webm, mka, mp4 or wma is the same slice of the whole file, wherever it starts."""

import io
import sys
import tracemalloc
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch

from acoustic.data.ffmpeg import FFmpegError, FFmpegFile, MissingFFmpeg
from tests.conftest import make_tone

av = pytest.importorskip("av")

SECONDS = 6.3
# PNS lets the decoder make up noise, from a generator that a seek doesn't set back.
AAC = ("aac", "fltp", {"aac_pns": "0"})
# container, codec, sample format, the encoder's options, rate, channels
FORMATS = {
    "m4a": ("ipod", *AAC, 44_100, 2),
    "m4a 16 kHz": ("ipod", *AAC, 16_000, 1),
    "m4a 5.1": ("ipod", *AAC, 48_000, 6),
    "alac": ("ipod", "alac", "s16p", {}, 44_100, 2),
    "webm": ("webm", "libopus", "flt", {}, 48_000, 2),
    "webm 60 ms": ("webm", "libopus", "flt", {"frame_duration": "60"}, 48_000, 1),
    "webm 2.5 ms": ("webm", "libopus", "flt", {"frame_duration": "2.5"}, 48_000, 2),
    "webm speech": ("webm", "libopus", "flt", {"application": "voip", "b": "16000"}, 16_000, 1),
    "mka vorbis": ("matroska", "vorbis", "fltp", {"strict": "-2"}, 44_100, 2),
    "mka flac": ("matroska", "flac", "s16", {}, 44_100, 2),
    "mka flac 5.1": ("matroska", "flac", "s16", {}, 48_000, 6),
    "mka aac": ("matroska", *AAC, 44_100, 2),
    "aac": ("adts", *AAC, 44_100, 2),
    "wma": ("asf", "wmav2", "fltp", {"b": "128000"}, 44_100, 2),
    "mov pcm": ("mov", "pcm_s24le", "s32", {}, 44_100, 2),
}
KINDS = list(FORMATS)
FORMATS |= {"aac other rate": ("adts", *AAC, 16_000, 2), "aac other channels": ("adts", *AAC, 44_100, 6)}
LOSSLESS = ("alac", "mka flac", "mka flac 5.1", "mov pcm")
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def original(kind: str, seconds: float = SECONDS) -> np.ndarray:
    """(frames, channels) int16."""
    *_, rate, channels = FORMATS[kind]
    return np.round(make_tone(seconds, rate, channels) * 32_767).astype(np.int16)


def audio_frames(samples: np.ndarray, rate: int, start: int = 0):
    for position in range(0, len(samples), 1000):
        block = np.ascontiguousarray(samples[position : position + 1000]).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(block, format="s16", layout=LAYOUTS[samples.shape[1]])
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), start + position
        yield frame


def add_audio(output, kind: str):
    _, codec, sample_format, options, rate, channels = FORMATS[kind]
    stream = output.add_stream(codec, rate=rate, options=options)
    stream.layout, stream.format = LAYOUTS[channels], sample_format
    return stream, av.AudioResampler(format=sample_format, layout=LAYOUTS[channels], rate=rate)


@cache
def encoded(kind: str, seconds: float = SECONDS, muxer: tuple = (), seekable: bool = True) -> bytes:
    buffer = io.BytesIO()
    target = buffer if seekable else WriteOnly(buffer)
    with av.open(target, "w", format=FORMATS[kind][0], options=dict(muxer)) as output:
        stream, resampler = add_audio(output, kind)
        for frame in [*audio_frames(original(kind, seconds), FORMATS[kind][4]), None]:
            for converted in resampler.resample(frame):
                output.mux(stream.encode(converted))
        output.mux(stream.encode(None))
    return buffer.getvalue()


class WriteOnly:
    """What a live recording is written to: nothing that is known only at the end gets into the header."""

    def __init__(self, buffer):
        self.write = buffer.write


def video(kind: str, delay: float, seconds: float) -> bytes:
    """The audio, beginning `delay` seconds after pictures that last for `seconds`."""
    buffer, rate = io.BytesIO(), FORMATS[kind][4]
    with av.open(buffer, "w", format="mp4" if kind == "m4a" else "matroska") as output:
        pictures = output.add_stream("mpeg4", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuv420p"
        stream, resampler = add_audio(output, kind)
        blocks = list(audio_frames(original(kind), rate, round(delay * rate)))
        for index in range(max(round(seconds * 10), 1)):
            picture = av.VideoFrame(32, 32, "yuv420p")
            picture.pts = index
            output.mux(pictures.encode(picture))
            for block in blocks[index * rate // 10_000 : (index + 1) * rate // 10_000]:
                for converted in resampler.resample(block):
                    output.mux(stream.encode(converted))
        for encoder in (stream, pictures):
            output.mux(encoder.encode(None))
    return buffer.getvalue()


def remuxed(content: bytes, change) -> bytes:
    """The same packets after `change(index, packet)`, which returns False to leave one out."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(content)) as source, av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream_from_template(source.streams.audio[0])
        for index, packet in enumerate(source.demux(source.streams.audio[0])):
            if packet.dts is not None and change(index, packet) is not False:
                packet.stream = stream
                output.mux(packet)
    return buffer.getvalue()


def whole(content: bytes) -> np.ndarray:
    """A plain decode from the first packet to the last; FFmpeg's own conversion to float."""
    with av.open(io.BytesIO(content)) as source:
        resampler = av.AudioResampler(format="fltp")
        frames = [part for frame in source.decode(audio=0) for part in resampler.resample(frame)]
        return np.concatenate([frame.to_ndarray().T for frame in frames])


def read(source, start: int, stop: int) -> np.ndarray:
    with FFmpegFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        assert file.seek(start) == start
        window = file.read(stop - start)
    assert window.dtype == np.float32 and window.shape[1] == file.channels
    return window


def length(content: bytes) -> int:
    with FFmpegFile(io.BytesIO(content)) as file:
        return file.frames


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_is_a_slice_of_the_whole_file(kind):
    content = encoded(kind)
    expected, frames = whole(content), length(content)
    rate = 48_000 if kind.startswith("webm") else FORMATS[kind][4]
    assert len(expected) - 2 * rate * 1024 / 16_000 <= frames <= len(expected)
    generator = np.random.default_rng(0)
    starts = [0, 1, *generator.integers(0, frames - 1, 8), *generator.integers(frames - rate, frames, 3), frames - 1]
    for start in map(int, starts):
        stop = int(generator.integers(start + 1, frames + 1))
        np.testing.assert_allclose(read(content, start, stop), expected[start:stop], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_is_the_original_channel_by_channel(kind):
    samples = original(kind)
    assert length(encoded(kind)) == len(samples)
    np.testing.assert_array_equal(read(encoded(kind), 0, len(samples)), samples / np.float32(2**15))
    start = len(samples) // 2 + 17
    np.testing.assert_array_equal(read(encoded(kind), start, start + 999), samples[start : start + 999] / 2**15)


@pytest.mark.parametrize("kind", ["m4a", "m4a 16 kHz", "m4a 5.1", "webm", "webm 60 ms"])
def test_lossy_is_the_original_in_its_place(kind):
    """The encoder's delay is cut off and the channels are in their order."""
    samples, channels = original(kind) / 2**15, FORMATS[kind][5]
    window = read(encoded(kind), 80_000, 90_000)
    correlation = np.corrcoef(window.T, samples[80_000:90_000].T)[:channels, channels:]
    assert np.abs(correlation - np.eye(channels)).max() < 0.1


def test_the_length_of_an_m4a_is_what_was_encoded():
    assert length(encoded("m4a")) == len(original("m4a"))


@pytest.mark.parametrize("kind", ["m4a", "webm", "mka vorbis", "aac"])
@pytest.mark.parametrize("seconds", [0.05, 1.0, 2.2])
def test_short_files(kind, seconds):
    content = encoded(kind, seconds)
    frames = length(content)
    assert round(seconds * FORMATS[kind][4]) <= frames <= len(whole(content))
    np.testing.assert_array_equal(read(content, 0, frames), whole(content)[:frames])


@pytest.mark.parametrize("kind", ["m4a", "mka aac"])
@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("seconds", [8, 90])
def test_the_audio_of_a_video(kind, delay, seconds):
    content = video(kind, delay, seconds)
    expected, frames = whole(content), length(content)
    assert 0 <= len(expected) - frames < 1024
    np.testing.assert_array_equal(read(content, 200_000, frames), expected[200_000:frames])


def test_written_live():
    """No duration, no cues (webm), no index of all fragments (mp4)."""
    webm = encoded("webm", muxer=(("live", "1"),), seekable=False)
    with av.open(io.BytesIO(webm)) as source:
        assert source.duration is None
    flags = (("movflags", "frag_keyframe+empty_moov+default_base_moof"), ("frag_duration", "500000"))
    mp4 = encoded("m4a", muxer=flags)
    for content in (webm, mp4[: mp4.rindex(b"mfra") - 4]):
        expected, frames = whole(content), length(content)
        assert 0 <= len(expected) - frames < 1024
        np.testing.assert_allclose(read(content, 200_000, frames), expected[200_000:frames], atol=1e-5)


def test_only_the_window_is_read_and_held():
    class Counting(io.BytesIO):
        count = 0

        def read(self, size=-1):
            data = super().read(size)
            self.count += len(data)
            return data

    for kind in ("alac", "webm", "mka flac"):
        content = encoded(kind, 60.0)
        source, frames = Counting(content), length(content)
        tracemalloc.start()
        window = read(source, frames - 48_000, frames)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert source.count < len(content) / 2
        assert peak < 2 * window.nbytes


def test_like_soundfile(tmp_path):
    path = tmp_path / "https:%00 a|b.m4a"  # nothing that is in a name means anything
    path.write_bytes(encoded("alac"))
    samples = original("alac") / np.float32(2**15)
    with FFmpegFile(str(path)) as file:
        assert (file.samplerate, file.channels, file.frames, file.format) == (44_100, 2, len(samples), "FFMPEG")
        np.testing.assert_array_equal(file.read(1_000), samples[:1_000])
        np.testing.assert_array_equal(file.read(1_000), samples[1_000:2_000])
        file.seek(len(samples) - 10)
        np.testing.assert_array_equal(file.read(1_000), samples[-10:])
        assert file.read(1_000).shape == (0, 2)
        file.seek(0)
        np.testing.assert_array_equal(file.read(), samples)
        file.seek(len(samples) + 5)
        assert file.read(10).shape == (0, 2)
        with pytest.raises(ValueError, match="before the start"):
            file.seek(-1)
        with pytest.raises(ValueError, match="only float32"):
            file.read(10, dtype="int16")
    assert file._file.closed
    source = io.BytesIO(encoded("alac"))
    FFmpegFile(source).close()
    assert not source.closed


def test_lost_packets_are_silence_and_move_nothing():
    content, lost = encoded("webm"), 150
    expected = whole(content)
    holed = remuxed(content, lambda index, _: not lost <= index < lost + 5)
    begin = lost * 960 - 312
    window = read(holed, begin - 2_000, begin + 100_000)
    assert len(window) == 102_000 and (window[2_000 : 2_000 + 5 * 960] == 0).all()
    np.testing.assert_array_equal(window[:2_000], expected[begin - 2_000 : begin])
    later = begin + 130_000
    np.testing.assert_allclose(read(holed, later, later + 960), expected[later : later + 960], atol=1e-5)


def test_jitter_is_no_hole():
    shifts = np.random.default_rng(0).integers(-3, 4, 1_000)

    def shift(index, packet):
        packet.pts = packet.dts = packet.pts + int(shifts[index]) * (index > 3)

    content = encoded("webm")
    jittered = remuxed(content, shift)
    np.testing.assert_array_equal(read(jittered, 0, 300_000), whole(content)[:300_000])


@pytest.mark.parametrize("kind", ["alac", "mka flac"])
def test_a_broken_packet_is_an_error_only_where_it_is(kind, capfd):
    content = bytearray(encoded(kind))
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    content, samples = bytes(content), original(kind) / np.float32(2**15)
    half = len(samples) // 2
    with pytest.raises(FFmpegError, match="^broken packet: "):
        read(content, half - 20_000, half + 20_000)
    for start in (0, half - 40_000, half + 30_000, len(samples) - 1_000):  # half + 30,000 has it in the preroll
        np.testing.assert_array_equal(read(content, start, start + 1_000), samples[start : start + 1_000])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["m4a", "alac"])
def test_truncated(kind, capfd):
    content = encoded(kind, muxer=(("movflags", "frag_keyframe+empty_moov+delay_moov"),))
    frames, cut = length(content), content[: len(content) * 2 // 3]
    assert length(cut) == frames
    for start in (frames - 1_000, frames // 2):
        with pytest.raises(FFmpegError, match="truncated|broken packet"):
            read(cut, start, frames)
    np.testing.assert_array_equal(read(cut, 100_000, 101_000), whole(content)[100_000:101_000])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["webm", "aac", "mka flac"])
def test_a_recording_that_was_cut_off_ends_there(kind):
    content = encoded(kind)
    cut = content[: len(content) * 2 // 3]
    frames = length(cut)
    assert 0.6 * length(content) < frames < 0.7 * length(content)
    expected = whole(content)
    np.testing.assert_allclose(read(cut, frames - 50_000, frames - 5_000), expected[frames - 50_000 : frames - 5_000])


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("aac other rate", "sample rate changes from 44100 to 16000 Hz"),
        ("aac other channels", "channels change from 2 to 6"),
    ],
)
def test_changes_in_mid_stream(other, reason):
    content, expected = encoded("aac") + encoded(other), whole(encoded("aac"))
    change = len(expected)
    np.testing.assert_array_equal(read(content, change - 60_000, change - 50_000), expected[-60_000:-50_000])
    with pytest.raises(FFmpegError, match=reason):
        read(content, change - 10_000, change + 10_000)


@pytest.mark.parametrize("content", [b"", b"\0" * 5_000, b"no audio, but words " * 500, bytes(range(256)) * 40])
def test_garbage(content, tmp_path, capfd):
    (tmp_path / "a.m4a").write_bytes(content)
    for source in (io.BytesIO(content), tmp_path / "a.m4a"):
        with pytest.raises(FFmpegError) as caught:
            FFmpegFile(source)
        assert str(tmp_path) not in str(caught.value) and "Errno" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_playlists_lead_nowhere(tmp_path):
    (tmp_path / "a.m4a").write_bytes(encoded("alac"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{tmp_path}/a.m4a\n#EXT-X-ENDLIST\n"
    for text in (playlist, f"ffconcat version 1.0\nfile {tmp_path}/a.m4a\n", "ffconcat version 1.0\nfile a.m4a\n"):
        (tmp_path / "list.m4a").write_text(text)
        with pytest.raises(FFmpegError):
            FFmpegFile(tmp_path / "list.m4a")


def test_no_audio_stream():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        pictures = output.add_stream("mpeg4", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuv420p"
        output.mux(pictures.encode(av.VideoFrame(32, 32, "yuv420p")))
        output.mux(pictures.encode(None))
    with pytest.raises(FFmpegError, match="^no audio stream$"):
        FFmpegFile(buffer)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        FFmpegFile(str(tmp_path / "a.m4a"))
    with pytest.raises(IsADirectoryError):
        FFmpegFile(tmp_path)


def test_without_pyav(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingFFmpeg, match="^needs PyAV: pip install av$"):
        FFmpegFile("a.m4a")


class Windows(torch.utils.data.Dataset):
    def __init__(self, content: bytes):
        self.content = content

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return read(self.content, index * 30_000, index * 30_000 + 16_000)


def test_in_forked_workers():
    content = encoded("m4a")
    expected = whole(content)  # FFmpeg has been at work before the fork
    loader = torch.utils.data.DataLoader(Windows(content), num_workers=2, multiprocessing_context="fork")
    for index, window in enumerate(loader):
        np.testing.assert_array_equal(window[0], expected[index * 30_000 : index * 30_000 + 16_000])

"""Remote files equal the local ones, whatever the network does; and what can't be read says why."""

import io
import random
import tarfile
import threading
import time

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader, IterableDataset

import tests.data.http_server as web
from acoustic.console import UserError
from acoustic.data import remote
from acoustic.data.remote import RemoteFile, Unreachable, is_remote, list_files

http_server = web.http_server


@pytest.fixture(autouse=True)
def milliseconds(monkeypatch):
    """Waits a thousand times shorter, and no proxy between the test and loopback."""
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(remote, "LONGEST_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def serve(server, name: str, size: int) -> bytes:
    content = random.Random(size).randbytes(size)
    path = server.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


def test_urls_and_local_paths():
    for url in ("https://a.b/c.wav", "s3://b/c", "hf://datasets/a/b", "memory://x", "zip://a.wav::https://h/a.zip"):
        assert is_remote(url)
    for path in ("a.wav", "/a/b.wav", "C:\\a.wav", "c:/a.wav", "c://a.wav", "a:b.wav", "", "./http/a.wav"):
        assert not is_remote(path)


def test_behaves_like_a_local_file(http_server, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(remote, "AHEAD_BYTES", 3000)
    content = serve(http_server, "a.bin", 50_001)
    local, draw = io.BytesIO(content), random.Random(0)
    with RemoteFile(http_server.url("a.bin")) as file:
        assert http_server.requests == []
        assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
        assert file.name == http_server.url("a.bin")
        for _ in range(300):
            offset, whence = draw.choice([(draw.randrange(60_000), 0), (draw.randrange(200), 1), (-50, 2), (0, 1)])
            assert file.seek(offset, whence) == local.seek(offset, whence)
            count = draw.choice([0, 1, 10, 999, 1000, 2500, 30_000])
            assert file.read(count) == local.read(count)
            assert file.tell() == local.tell()
        file.seek(7)
        buffer = bytearray(1500)
        assert file.readinto(buffer) == 1500 and buffer == content[7:1507]
        assert file.read() == content[1507:]
        assert file.read() == file.read(5) == b""
        assert file.size == 50_001
        with pytest.raises(ValueError, match="negative"):
            file.seek(-1)
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


def test_small_reads_share_requests_and_a_large_one_is_one(http_server):
    content = serve(http_server, "a.bin", 2_000_000)
    file = RemoteFile(http_server.url("a.bin"))
    assert b"".join(file.read(4096) for _ in range(250)) == content[: 250 * 4096]
    assert http_server.fetches("a.bin") <= 5
    assert http_server.bytes_sent("a.bin") <= 250 * 4096 + remote.AHEAD_BYTES
    http_server.requests.clear()
    file.seek(100)
    assert file.read(1_900_000) == content[100:1_900_100]
    assert http_server.fetches("a.bin") == 1


def test_empty_file(http_server):
    serve(http_server, "empty.wav", 0)
    assert RemoteFile(http_server.url("empty.wav")).read() == b""


def test_header_and_window_of_a_long_wav_cost_little(http_server, audio_file):
    path = audio_file(http_server.folder / "long.wav", seconds=600)
    file = soundfile.SoundFile(RemoteFile(http_server.url("long.wav"), keep_errors=True))
    assert file.frames == 600 * 16_000
    assert http_server.bytes_sent("long.wav") == remote.BLOCK_BYTES
    http_server.requests.clear()
    file.seek(300 * 16_000)
    window = file.read(160_000)
    assert (window == soundfile.read(path, start=300 * 16_000, frames=160_000)[0]).all()
    assert http_server.bytes_sent("long.wav") <= 320_000 + remote.BLOCK_BYTES + remote.AHEAD_BYTES
    assert http_server.fetches("long.wav") <= 3


FAULTS = ["503", "429", "500", "drop", "short", "redirect", "ok", "ok"]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_windows_equal_the_local_ones_under_faults(http_server, audio_file, monkeypatch, suffix, ranges):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(remote, "AHEAD_BYTES", 16_384)
    monkeypatch.setattr(remote, "ATTEMPTS", 12)  # five of eight answers are faults
    http_server.ranges = ranges
    path, draw = audio_file(http_server.folder / f"a{suffix}", seconds=20), random.Random(0)
    for _ in range(1000):
        http_server.fail(path.name, draw.choice(FAULTS))
    source = RemoteFile(http_server.url(path.name), keep_errors=True)
    with soundfile.SoundFile(source) as file, soundfile.SoundFile(path) as local:
        assert (file.frames, file.samplerate, file.channels) == (local.frames, local.samplerate, local.channels)
        for _ in range(8):
            start = draw.randrange(local.frames - 16_000)
            file.seek(start), local.seek(start)
            assert (file.read(16_000) == local.read(16_000)).all()
    assert source.error is None


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("503", "503 Service Unavailable"),
        ("429", "429 Too Many Requests"),
        ("500", "500 Internal Server Error"),
        ("drop", "connection dropped"),
        ("short", "connection dropped"),
        ("stall", "no answer in 0.1 s"),
    ],
)
def test_a_fault_is_retried_then_given_up_with_its_reason(http_server, monkeypatch, kind, reason):
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 0.1)
    content = serve(http_server, "a.bin", 5000)
    http_server.fail("a.bin", kind, times=3)
    assert RemoteFile(http_server.url("a.bin")).read() == content
    http_server.fail("a.bin", kind, times=None)
    with pytest.raises(Unreachable) as caught:
        RemoteFile(http_server.url("a.bin")).read()
    assert str(caught.value) == f"{reason}, after 5 attempts"


def test_a_server_that_is_not_there(http_server):
    with web.FaultyServer(http_server.folder) as gone:
        url = gone.url("a.bin")
    with pytest.raises(Unreachable, match="connection refused, after 5 attempts"):
        RemoteFile(url).read()


def test_a_file_goes_on_after_a_fault(http_server):
    content = serve(http_server, "a.bin", 500_000)
    file = RemoteFile(http_server.url("a.bin"))
    assert file.read(10) == content[:10]
    http_server.fail("a.bin", "503", times=5)
    file.seek(300_000)
    with pytest.raises(Unreachable):
        file.read(10)
    assert isinstance(file.error, Unreachable) and file.tell() == 300_000
    assert file.read(10) == content[300_000:300_010]


@pytest.mark.parametrize(
    "kind, error", [("404", FileNotFoundError), ("401", PermissionError), ("403", PermissionError)]
)
def test_what_will_not_change_is_not_retried(http_server, kind, error):
    serve(http_server, "a.bin", 10)
    http_server.fail("a.bin", kind, times=None)
    with pytest.raises(error):
        RemoteFile(http_server.url("a.bin")).read()
    assert len(http_server.requests) == 2  # HEAD, and GET for the servers that refuse HEAD
    with pytest.raises(FileNotFoundError):
        RemoteFile(http_server.url("nowhere.bin")).size  # noqa: B018


def test_other_client_errors_are_not_retried(http_server):
    serve(http_server, "a.bin", 10)
    http_server.fail("a.bin", "400", times=None)
    with pytest.raises(Unreachable, match="^400 Bad Request$"):
        RemoteFile(http_server.url("a.bin")).read()


@pytest.mark.parametrize("asked, least, most", [("0.05", 0.2, 1.0), ("3600", 0.4, 1.5), ("nonsense", 0.0, 0.3)])
def test_retry_after_is_honoured_and_bounded(http_server, asked, least, most):
    serve(http_server, "a.bin", 10)
    http_server.fail("a.bin", "429", times=None, retry_after=asked)
    began = time.monotonic()
    with pytest.raises(Unreachable):
        RemoteFile(http_server.url("a.bin")).read()
    assert least <= time.monotonic() - began < most


def test_retry_after_as_a_date():
    class Answer(Exception):
        headers = {"Retry-After": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 10))}

    assert 8 < remote._retry_after(Answer()) <= 10


def test_waits_double_with_jitter_and_are_bounded(monkeypatch):
    waits, calls = [], []
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.5)
    monkeypatch.setattr(remote, "LONGEST_WAIT_SECONDS", 3)
    monkeypatch.setattr(remote.time, "sleep", waits.append)

    def request(fs, path):
        calls.append(path)
        raise ConnectionResetError

    with pytest.raises(Unreachable, match="connection dropped, after 5 attempts"):
        remote._with_retries("memory://a", request)
    assert len(calls) == 5 and len(waits) == 4
    assert all(full / 2 <= wait <= full for wait, full in zip(waits, [0.5, 1, 2, 3]))


def test_without_ranges_the_file_is_fetched_once(http_server):
    http_server.ranges = False
    content = serve(http_server, "a.bin", 3_000_000)
    file = RemoteFile(http_server.url("a.bin"))
    for start in (2_900_000, 0, 1_500_000):
        file.seek(start)
        assert file.read(5000) == content[start : start + 5000]
    assert http_server.fetches("a.bin") == 1


def test_a_server_that_does_not_tell_the_length(http_server):
    content = serve(http_server, "a.bin", 100_000)
    http_server.fail("a.bin", "no length", times=None)
    file = RemoteFile(http_server.url("a.bin"))
    assert (file.size, file.read(10), file.read()) == (100_000, content[:10], content[10:])


def test_nothing_comes_compressed(http_server):
    (http_server.folder / "a.bin").write_bytes(bytes(100_000))
    http_server.fail("a.bin", "gzip", times=None)
    assert RemoteFile(http_server.url("a.bin")).read() == bytes(100_000)
    assert http_server.bytes_sent("a.bin") == 100_000


def test_redirect(http_server):
    content = serve(http_server, "a.bin", 1000)
    http_server.fail("a.bin", "redirect", times=None)
    assert RemoteFile(http_server.url("a.bin")).read() == content


@pytest.mark.parametrize(
    "name", ["two words.bin", "a#1.bin", "100%.bin", "a%20b.bin", "grüße/日本.bin", "a+b&c=d.bin"]
)
def test_names_that_urls_must_quote(http_server, name):
    content = serve(http_server, name, 100)
    assert RemoteFile(http_server.url(name)).read() == content
    assert [RemoteFile(url).read() for url in list_files(http_server.url())] == [content]
    if name != "a%20b.bin":  # which unquoted is "a b.bin"
        assert RemoteFile(http_server.url() + name).read() == content


def test_errors_kept_for_soundfile(http_server, audio_file, capfd):
    audio_file(http_server.folder / "a.wav", seconds=60)
    source = RemoteFile(http_server.url("a.wav"), keep_errors=True)
    with soundfile.SoundFile(source) as file:
        http_server.fail("a.wav", "503", times=None)
        file.seek(30 * 16_000)
        assert len(file.read(16_000)) < 16_000
        answered = len(http_server.requests)
        assert source.read(10) == b"" and len(http_server.requests) == answered
    assert str(source.error) == "503 Service Unavailable, after 5 attempts"
    missing = RemoteFile(http_server.url("missing.wav"), keep_errors=True)
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.SoundFile(missing)
    assert isinstance(missing.error, FileNotFoundError) and missing.size == 0
    assert capfd.readouterr().err == ""


def test_a_key_pressed_during_a_read_is_kept_too(monkeypatch):
    def interrupt(url, request):
        raise KeyboardInterrupt

    monkeypatch.setattr(remote, "_with_retries", interrupt)
    file = RemoteFile("memory://a", keep_errors=True)
    assert file.read(1) == b"" and isinstance(file.error, KeyboardInterrupt)


def test_tar_and_parquet(http_server):
    content = serve(http_server, "member.bin", 700_000)
    with tarfile.open(http_server.folder / "a.tar", "w") as archive:
        for index in range(3):
            archive.add(http_server.folder / "member.bin", f"{index}.bin")
    pyarrow.parquet.write_table(
        pyarrow.table({"audio": [content, content[::-1]]}), http_server.folder / "a.parquet", row_group_size=1
    )
    for name in ("a.tar", "a.parquet"):
        http_server.fail(name, "drop", times=2)
    with tarfile.open(fileobj=RemoteFile(http_server.url("a.tar"))) as archive:
        assert [archive.extractfile(member).read() for member in archive] == [content] * 3
    http_server.requests.clear()
    file = pyarrow.parquet.ParquetFile(RemoteFile(http_server.url("a.parquet")))
    assert file.read_row_group(1)["audio"].to_pylist() == [content[::-1]]
    assert http_server.fetches("a.parquet") <= 5
    http_server.fail("a.tar", "503", times=None)
    with pytest.raises(Unreachable):
        tarfile.open(fileobj=RemoteFile(http_server.url("a.tar")))


def test_lists_folders_and_globs(http_server):
    names = ["a.wav", "b.flac", "deep/er/c.wav", "deep/d d.wav", "deep/e[1].wav"]
    for name in names:
        serve(http_server, name, 10)
    (http_server.folder / "empty").mkdir()
    http_server.fail("", "503", times=2)
    http_server.fail("deep/er/", "drop", times=1)
    http_server.fail("deep/er/", "500", times=2)

    def found(pattern):
        return [name for name in names if http_server.url(name) in list_files(http_server.url() + pattern)]

    assert list_files(http_server.url()) == sorted(http_server.url(name) for name in names)
    assert list_files(http_server.url("deep")) == sorted(http_server.url(name) for name in names[2:])
    assert list_files(http_server.url("a.wav")) == [http_server.url("a.wav")]
    assert list_files(http_server.url("empty")) == list_files(http_server.url("empty/")) == []
    http_server.requests.clear()
    assert found("*.wav") == ["a.wav"]
    assert {request.path for request in http_server.requests} == {""}  # "deep" can't hold a match
    assert found("**/*.wav") == ["a.wav", "deep/er/c.wav", "deep/d d.wav", "deep/e[1].wav"]
    assert found("deep/*.wav") == ["deep/d d.wav", "deep/e[1].wav"]
    assert found("d*/d d.wav") == ["deep/d d.wav"]
    assert found("[!a].*") == ["b.flac"]


def test_a_folder_that_fails_is_not_left_out(http_server):
    serve(http_server, "a.wav", 10), serve(http_server, "deep/b.wav", 10)
    http_server.fail("deep/", "503", times=None)
    for pattern in ("", "**/*.wav"):
        with pytest.raises(Unreachable, match="503"):
            list_files(http_server.url() + pattern)
    with pytest.raises(FileNotFoundError):
        list_files(http_server.url("nowhere/"))


def test_other_file_systems():
    fs = fsspec.filesystem("memory")
    content = random.Random(0).randbytes(100_000)
    for name in ("a.wav", "x/b.wav", "x/c.txt"):
        fs.pipe(f"/test_remote/{name}", content)
    try:
        files = list_files("memory://test_remote")
        assert [name.split("test_remote/")[1] for name in files] == ["a.wav", "x/b.wav", "x/c.txt"]
        assert list_files("memory://test_remote/**/b.*") == files[1:2]
        file = RemoteFile(files[0])
        file.seek(90_000)
        assert file.read() == content[90_000:] and file.size == 100_000
        with pytest.raises(FileNotFoundError):
            RemoteFile("memory://test_remote/nowhere").read()
        with pytest.raises(IsADirectoryError):
            RemoteFile("memory://test_remote/x").read()
    finally:
        fs.rm("/test_remote", recursive=True)


def test_a_missing_package_and_an_unknown_scheme(monkeypatch):
    def not_installed(url):
        raise ImportError("Install s3fs to access S3") from ModuleNotFoundError("No module named 's3fs'", name="s3fs")

    with pytest.raises(UserError, match="nonesuch"):
        RemoteFile("nonesuch://a/b.wav").read()
    monkeypatch.setattr(fsspec.core, "url_to_fs", not_installed)
    with pytest.raises(UserError, match="pip install s3fs$"):
        list_files("s3://bucket/a.wav")


def test_an_offline_hub_is_not_retried(monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 1)  # were it retried, the reason would count attempts
    with pytest.raises(Unreachable, match="offline mode is enabled") as caught:
        RemoteFile("hf://datasets/someone/sounds/a.wav").read()
    assert "attempts" not in str(caught.value)


class Heads(IterableDataset):
    def __init__(self, urls):
        self.urls = urls

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for url in self.urls[worker.id :: worker.num_workers]:
            yield url, RemoteFile(url).read()


def test_in_forked_workers_of_a_parent_that_has_read(http_server):
    contents = {http_server.url(f"{size}.bin"): serve(http_server, f"{size}.bin", size) for size in range(10, 16)}
    file = RemoteFile(next(iter(contents)))
    assert file.read(5) == contents[file.name][:5]
    loader = DataLoader(Heads(list(contents)), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert dict(loader) == contents


def test_in_threads(http_server):
    content, results = serve(http_server, "a.bin", 300_000), []

    def read():
        results.append(RemoteFile(http_server.url("a.bin")).read())

    threads = [threading.Thread(target=read) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == [content] * 8


def test_the_server_stops_at_once(http_server, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 0.05)
    serve(http_server, "a.bin", 10)
    began = time.monotonic()
    with web.FaultyServer(http_server.folder) as server:
        server.fail("a.bin", "stall", times=None, seconds=60)
        with pytest.raises(Unreachable):
            RemoteFile(server.url("a.bin")).read()
    assert time.monotonic() - began < 3

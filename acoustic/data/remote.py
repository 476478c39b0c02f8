"""Files behind URLs, read by ranges, over a network that stalls, drops connections and says 503.

Worst case of a read that never succeeds, with the constants below: 5 answers waited for, 20 s each, and 7.5 s between
them, so 108 s. The first read also asks for the size, where a stalled attempt costs twice the time: HEAD, then GET. A
server that asks for patience (Retry-After) gets 30 s at most between two attempts. s3:// and hf:// have time limits
and retries of their own (s3fs 15 s, huggingface_hub 10 s), which come on top of these.
"""

import asyncio
import email.utils
import errno
import io
import random
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime, timezone
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote

import datasets
import fsspec
from fsspec.exceptions import FSTimeoutError
from huggingface_hub.constants import HF_HUB_CACHE

from acoustic.console import UserError

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.5  # doubles from attempt to attempt
LONGEST_WAIT_SECONDS = 30  # whatever Retry-After asks for
TIMEOUT_SECONDS = 20  # without a single byte from the server
BLOCK_BYTES = 64 * 1024  # what a small read fetches, so the price of a header
AHEAD_BYTES = 256 * 1024  # and where it goes on from the last fetch: fewer round trips
KEPT_BLOCKS = 16  # a header at the front, the tags at the end, and what is being read

# Worth another attempt: overload and time limits. Any other status of 400 or more says the same the next time.
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}

# Errors of the call itself: a malformed URL, a file system that can't do this.
HOPELESS = (ValueError, TypeError, AttributeError, NotImplementedError, IsADirectoryError, NotADirectoryError)

# The system's generator: forked workers share a state of `random`, and would come back all at the same moment.
_jitter = random.SystemRandom()


class Unreachable(OSError):
    """The source could not be read. `str()` is the reason: "503 Service Unavailable, after 5 attempts"."""


class _CutShort(OSError):
    """An answer with fewer bytes than asked for, though its own Content-Length may agree with it."""


def is_remote(path: str) -> bool:
    """Whether it is "scheme://...", so fsspec's; a scheme of one letter is a Windows drive."""
    return re.match(r"([a-z][a-z0-9+.-]+::)*[a-z][a-z0-9+.-]+://", path, re.IGNORECASE) is not None


def names_this_machine(path: str) -> bool:
    """Whether what came from elsewhere names a file of this machine, other than one that `datasets` downloaded."""
    if is_remote(path):
        return re.search(r"(^|::)(file|local)://", path, re.IGNORECASE) is not None
    downloads = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    return not any(Path(path).resolve().is_relative_to(Path(folder).resolve()) for folder in downloads)


class RemoteFile(io.RawIOBase):
    """A remote file as a seekable binary file, for soundfile, tarfile and pyarrow.

    Nothing is asked of the server before the first read (or seek from the end). Small reads fetch blocks of
    `BLOCK_BYTES` (`AHEAD_BYTES` in reading on), and the last `KEPT_BLOCKS` stay in memory; a large read is one
    request. Where a server doesn't know ranges, the file is fetched whole, once, and stays in memory until closed.

    Args:
        url: "https://...", "s3://...", "hf://...": whatever fsspec opens. In http URLs "#" counts as part of the name.
        keep_errors: never raise from read, seek and tell. libsndfile calls them through callbacks that can't pass an
            exception on; so the file seems to end instead, and the caller has to raise `error` afterwards.

    Attributes:
        name: the URL.
        error: the last exception, KeyboardInterrupt included, or None. With `keep_errors`, the file ends after it.

    Raises (read, readinto, seek from the end, size):
        FileNotFoundError, PermissionError (401, 403), IsADirectoryError: at once.
        Unreachable: after all attempts.
        UserError: the package for this kind of URL isn't installed.
    """

    def __init__(self, url: str, keep_errors: bool = False):
        super().__init__()
        self.name = url
        self.error: BaseException | None = None
        self._keep_errors = keep_errors
        self._position = 0
        self._size: int | None = None
        self._block_bytes = BLOCK_BYTES
        self._blocks: OrderedDict[int, bytes] = OrderedDict()  # index -> content, the least recently used first
        self._fetched_to: int | None = None
        self._whole: bytes | None = None

    @property
    def size(self) -> int:
        """In bytes. With `keep_errors`, 0 where it can't be learned."""
        if self._size is None:
            self._guarded(self._learn_size)
        return self._size or 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}
        position = offset + (self.size if whence == io.SEEK_END else origin[whence])
        if position < 0 and not self._keep_errors:
            raise ValueError(f"negative seek position {position}")
        self._position = max(position, 0)
        return self._position

    def read(self, count: int | None = -1) -> bytes:
        """The next `count` bytes, fewer only at the end of the file; all of the rest for -1 or None."""
        return self._guarded(self._read, count) or b""

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._blocks.clear()
        self._whole = None
        super().close()

    def _guarded(self, action: Callable, *arguments):
        if self._keep_errors and self.error is not None:
            return None
        try:
            return action(*arguments)
        except BaseException as error:
            self.error = error
            if not self._keep_errors:
                raise
            return None

    def _learn_size(self) -> None:
        info = _with_retries(self.name, lambda fs, path: fs.info(path))
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "a folder, not a file", self.name)
        if info["size"] is None:  # a server that doesn't say
            self._whole = _with_retries(self.name, lambda fs, path: fs.cat_file(path))
        self._size = len(self._whole) if info["size"] is None else info["size"]

    def _read(self, count: int | None) -> bytes:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if self._size is None:
            self._learn_size()
        start = self._position
        stop = self._size if count is None or count < 0 else min(start + count, self._size)
        data = self._bytes(start, stop) if start < stop else b""
        self._position = start + len(data)
        return data

    def _bytes(self, start: int, stop: int) -> bytes:
        """What is in memory from `start` on, and the rest by one request, rounded to whole blocks."""
        pieces = []
        while start < stop and self._whole is None and (block := self._blocks.get(start // self._block_bytes)):
            index, offset = divmod(start, self._block_bytes)
            self._blocks.move_to_end(index)
            pieces.append(block[offset : stop - index * self._block_bytes])
            start += len(pieces[-1])
        if start < stop and self._whole is None:
            first = start - start % self._block_bytes
            goal = max(stop, first + AHEAD_BYTES) if first == self._fetched_to else stop
            end = min(goal + -goal % self._block_bytes, self._size)
            data = _with_retries(self.name, lambda fs, path: self._fetch(fs, path, first, end))
            self._remember(first, data)
            pieces.append(data[start - first : stop - first])
        elif start < stop:
            pieces.append(self._whole[start:stop])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _fetch(self, fs, path: str, start: int, stop: int) -> bytes:
        # File systems that aren't asynchronous open the file for it, and would read 5 MB ahead.
        options = {} if fs.async_impl else {"cache_type": "none"}
        data = fs.cat_file(path, start=start, end=stop, **options)
        if len(data) == stop - start:
            return data
        if len(data) == self._size:  # a server without ranges sends everything
            self._whole = data
            self._blocks.clear()
            return data[start:stop]
        raise _CutShort(f"{len(data)} bytes came instead of {stop - start}")

    def _remember(self, first: int, data: bytes) -> None:
        self._fetched_to = first + len(data)
        if self._whole is not None:
            return
        kept_from = max(0, (-(-len(data) // self._block_bytes) - KEPT_BLOCKS) * self._block_bytes)
        for offset in range(kept_from, len(data), self._block_bytes):
            self._blocks[(first + offset) // self._block_bytes] = data[offset : offset + self._block_bytes]
        while len(self._blocks) > KEPT_BLOCKS:
            self._blocks.popitem(last=False)


def list_files(url: str) -> list[str]:
    """All files below a remote folder, or matching a remote glob ("**" for folders of any depth), sorted.

    Over http this reads the server's HTML listings, folder by folder, and "?" is no wildcard there. The URLs are full,
    and percent-encoded where the server's links are. Raises what `RemoteFile` raises; nothing found is an empty list.
    """
    return sorted(set(_list_http(_quote_hash(url)) if _is_http(url) else _with_retries(url, _list)))


def _list(fs, path: str) -> list[str]:
    if re.search(r"[*?\[]", path):
        names = [name for name, info in fs.glob(path, detail=True).items() if info["type"] == "file"]
    else:
        names = fs.find(path)
    return [fs.unstrip_protocol(name) for name in names]


def _list_http(url: str) -> list[str]:
    """fsspec's own `find` leaves out folders that fail, and would start over with the first one after each fault."""
    magic = re.compile(r"[*\[]").search(url, url.find("/", len("https://")))  # an IPv6 host has brackets, too
    if magic is None:
        files = _walk_http(url, depth=-1)
        is_one_file = not files and not url.endswith("/") and not _is_page(url)
        return [url] if is_one_file else files
    root = url[: url.rindex("/", 0, magic.start()) + 1]
    depth = -1 if "**" in url else url.count("/", magic.start())
    pattern = _glob_pattern(unquote(url))
    return [file for file in _walk_http(root, depth) if pattern.fullmatch(unquote(file))]


def _walk_http(root: str, depth: int) -> list[str]:
    """Files of the listing of `root` and of `depth` levels of folders below; -1 for all of them."""
    files, seen, folders = [], {root}, [(root, depth)]
    while folders:
        folder, depth = folders.pop()
        try:
            entries = _with_retries(folder, lambda fs, path: fs.ls(path, detail=True))
        except FileNotFoundError:
            if folder == root:
                raise
            continue  # a dead link in a listing
        for entry in entries:
            name = entry["name"]
            if entry["type"] != "directory":
                files.append(name)
            elif depth != 0 and name not in seen and not name.endswith(("/./", "/../")):
                seen.add(name)
                folders.append((name, depth - 1))
    return files


def _is_page(url: str) -> bool:
    return _with_retries(url, lambda fs, path: fs.info(path)).get("mimetype") == "text/html"


def _glob_pattern(glob: str) -> re.Pattern:
    def translate(part: str) -> str:
        if part.startswith("[") and part.endswith("]"):
            return f"[^{part[2:-1]}]" if part[1] == "!" else part
        return {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}.get(part) or re.escape(part)

    return re.compile("".join(map(translate, re.split(r"(\*\*/|\*\*|\*|\[[^\]/]+\])", glob))))


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _quote_hash(url: str) -> str:
    """No server ever sees what follows a "#"; in the name of a recording it is meant to be part of the name."""
    return url.replace("#", "%23")


def _filesystem(url: str):
    """fsspec's file system (a cached one), and the path there. Asked for at each request, as a fork invalidates it.

    Raises UserError: nothing installed can read such a URL.
    """
    scheme = url.split("://")[0]
    try:
        if _is_http(url):
            return fsspec.filesystem("http", client_kwargs=_http_options()), _quote_hash(url)
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = getattr(error.__cause__ or error, "name", None) or scheme
        package = {"smbclient": "smbprotocol"}.get(package, package)
        raise UserError(f"{url}: {scheme}:// needs a package that isn't installed: pip install {package}") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


def _http_options() -> dict:
    import aiohttp  # fsspec's own client for http; it isn't needed for local audio

    # aiohttp allows 5 minutes for everything; ours is a limit on silence, so that a large file may take its time.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_SECONDS, sock_read=TIMEOUT_SECONDS)
    # Ranges count bytes as sent, so nothing may be compressed. trust_env: proxies and .netrc, as `datasets` has it.
    return {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}, "trust_env": True}


def _with_retries(url: str, request: Callable):
    """`request(file system, path)`; time and again while the fault may pass. Raises what `RemoteFile` lists."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request(*_filesystem(url))
        except UserError:
            raise
        except Exception as error:
            cause = _cause(error)
            _raise_if_permanent(cause, url)
            reason = _reason(cause)
            if attempt == ATTEMPTS:
                raise Unreachable(f"{reason}, after {ATTEMPTS} attempts") from error
        _wait(attempt, cause)


def patiently(action: Callable):
    """`action()`, again while a server says that it has no time (`TRANSIENT_STATUS`). Raises what `action` does."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:
            if attempt == ATTEMPTS or _status(error) not in TRANSIENT_STATUS:
                raise
            cause = error
        _wait(attempt, cause)


def _wait(attempt: int, error: Exception) -> None:
    """Twice as long from attempt to attempt, and at least as long as the server asked for."""
    seconds = max(FIRST_WAIT_SECONDS * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1), _retry_after(error))
    time.sleep(min(seconds, LONGEST_WAIT_SECONDS))


def _cause(error: Exception) -> Exception:
    """fsspec says FileNotFoundError for any trouble in learning the size over http; the truth is its cause."""
    cause = error.__cause__
    is_network = isinstance(cause, OSError | asyncio.TimeoutError) or type(cause).__module__.startswith("aiohttp")
    return cause if isinstance(error, FileNotFoundError) and (is_network or _status(cause)) else error


def _raise_if_permanent(error: Exception, url: str) -> None:
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, "no such file", url) from error
    # botocore's, which s3fs passes on.
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ == "NoCredentialsError":
        raise PermissionError(errno.EACCES, _reason(error), url) from error
    if isinstance(error, IsADirectoryError):
        raise error
    is_offline = type(error).__name__ == "OfflineModeIsEnabled"  # HF_HUB_OFFLINE=1
    if is_offline or isinstance(error, HOPELESS) or (status is not None and status not in TRANSIENT_STATUS):
        raise Unreachable(_reason(error)) from error


def _status(error) -> int | None:
    """The HTTP status in an exception of aiohttp, gcsfs, httpx, requests or botocore; None where there is none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = (
            getattr(response, "status_code", None) or getattr(error, "status", None) or getattr(error, "code", None)
        )
    return status if isinstance(status, int) and status >= 400 else None


def _reason(error: Exception) -> str:
    status, cause = _status(error), getattr(error, "os_error", None) or error
    if status is not None:
        return f"{status} {HTTPStatus(status).phrase}" if status in HTTPStatus._value2member_map_ else str(status)
    if isinstance(error, TimeoutError | asyncio.TimeoutError | FSTimeoutError) or "Timeout" in type(error).__name__:
        return f"no answer in {TIMEOUT_SECONDS:g} s"
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused"
    if isinstance(cause, socket.gaierror):
        return "host not found"
    resets = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, _CutShort)
    dropped = ("ClientPayloadError", "ServerDisconnectedError", "RemoteProtocolError", "IncompleteRead")
    was_reset = isinstance(error, resets) or getattr(error, "errno", None) in (errno.ECONNRESET, errno.EPIPE)
    if was_reset or type(error).__name__ in dropped:
        return "connection dropped"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _retry_after(error: Exception) -> float:
    """Seconds that the server asked for, as a number or as a date; 0 where it didn't."""
    headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
    value = headers.get("Retry-After", "0")
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max((email.utils.parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return 0.0

"""Checkpoints to the Hub while the run goes on, and back: a Hub that fails costs a warning and is asked again.

What is pushed: the model's files, the card and its figures; with `--hub_strategy checkpoint` also all of the newest
checkpoint, optimizer included, as last-checkpoint/, from which another machine can go on. run.json and
data_report.json stay here: they name local files.
"""

import os
import shutil
import threading
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, logging
from huggingface_hub.utils._http import default_client_factory

from acoustic.console import UserError, say
from acoustic.data.remote import patiently
from acoustic.training import checkpoint as files

LAST = "last-checkpoint"
# Of an output folder, or a checkpoint, what a model on the Hub consists of.
MODEL = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "preprocessor_config.json",
    "tokenizer*.json",
    "vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
REPORT = ("README.md", "figures/*.png", "all_results.json")
# For the Hub to connect, to answer, to take the next bytes, in seconds: huggingface_hub would wait for ever.
PATIENCE = (10.0, 100.0, 100.0, 100.0)
# What a run that was told to stop still waits for; schedulers kill it half a minute after their signal.
SECONDS_TO_STOP = 15


def open_repo(args) -> str:
    """Create the repository unless it is there, and see that it can be written to: before anything is computed.

    Returns:
        Its full name, "user/name".

    Raises:
        UserError: no token, no permission, no such name, or no Hub.
    """
    token = get_token()
    if token is None:
        raise UserError("push_to_hub: there is no token: `hf auth login`, or HF_TOKEN in the environment")
    limit_waiting()
    api, name = HfApi(token=token), args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        name = patiently(lambda: api.create_repo(name, private=args.hub_private_repo, exist_ok=True)).repo_id
        api.auth_check(name, write=True)
    except HFValidationError as error:
        raise UserError(f"hub_model_id: {name!r} is no name of a repository: {first_line(error)}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
            raise UserError(
                f"push_to_hub: the token may not write to {name!r} ({reason(error)}); make one with the role 'write' "
                f"at {api.endpoint}/settings/tokens, or choose a hub_model_id of your own"
            ) from None
        raise UserError(unreachable(api.endpoint, error)) from None
    except Exception as error:  # whatever the client's network raises
        raise UserError(unreachable(api.endpoint, error)) from None
    return name


def limit_waiting() -> None:
    """A server that takes a request and then says nothing must hold up neither a start nor the end of a run."""

    def client():
        client = default_client_factory()
        client.timeout = PATIENCE
        return client

    set_client_factory(client)


def unreachable(endpoint: str, error: Exception) -> str:
    return (
        f"push_to_hub: {endpoint} can't be asked whether this token may write there ({reason(error)}); try again, or "
        "train without push_to_hub: `hf upload` takes the finished model"
    )


class Pusher:
    """In one thread beside the training; of what waits only the newest is pushed.

    A push is one commit, so a revision of its own. Large files that an earlier try has uploaded are not sent again.

    Args:
        repo: "user/name".
        whole: push all of a checkpoint too.
    """

    def __init__(self, repo: str, output_dir: str, whole: bool = False):
        limit_waiting()
        self.api, self.repo, self.whole = HfApi(token=get_token()), repo, whole
        self.folder = Path(output_dir, "_hub")
        self.waiting: tuple[str, Path] | None = None
        self.failed: str | None = None  # of the newest that was to be pushed
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.be_quiet()

    def be_quiet(self) -> None:
        """Bars and tries from another thread would tear the run's own lines; what fails is said in one line.

        The Trainer turns the bars on again at the end of the updates, when a push may be on its way.
        """
        disable_progress_bars()
        logging.set_verbosity_error()

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Returns at once. A checkpoint may be deleted before its turn: links keep its files."""
        staged = self.folder / checkpoint.name
        try:
            stage(checkpoint, staged, MODEL)
            if self.whole:
                stage(checkpoint, staged / LAST, ("**/*",))
        except OSError as error:
            problem = error.strerror or str(error)
            say(f"warning: {checkpoint.name} could not be prepared for the Hub ({problem}); the next one will be")
            return
        self.submit(f"update {files.update_of(checkpoint)}", staged)

    def submit(self, title: str, staged: Path) -> None:
        with self.lock:
            if self.waiting is not None:
                shutil.rmtree(self.waiting[1], ignore_errors=True)
            self.waiting = (title, staged)
            if self.thread is None or not self.thread.is_alive():
                # A daemon: a Hub that hangs can't keep a finished run from ending.
                self.thread = threading.Thread(target=self.work, daemon=True, name="push")
                self.thread.start()

    def work(self) -> None:
        while True:
            with self.lock:
                if self.waiting is None:
                    self.thread = None
                    return
                (title, staged), self.waiting = self.waiting, None
            problem = self.attempt(title, staged)
            self.failed = problem
            shutil.rmtree(staged, ignore_errors=True)  # its links keep what else would be deleted
            if problem is not None:
                say(
                    f"warning: {title} could not be pushed to {self.repo} ({problem}); the run goes on, and the next "
                    "save is pushed"
                )

    def attempt(self, title: str, staged: Path) -> str | None:
        """What went wrong, in words."""
        try:
            self.commit(title, staged)
        except Exception as error:  # whatever the client and its network raise
            return reason(error)
        return None

    def commit(self, title: str, staged: Path) -> None:
        """All files of a folder as one commit, without what an earlier last-checkpoint/ had and this one hasn't."""
        names = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
        operations = [CommitOperationAdd(name, str(staged / name)) for name in names]
        if any(name.startswith(f"{LAST}/") for name in names):
            there = [name for name in self.api.list_repo_files(self.repo) if name.startswith(f"{LAST}/")]
            operations += [CommitOperationDelete(name) for name in there if name not in names]
        self.api.create_commit(self.repo, operations, commit_message=title)

    def wait(self, seconds: float | None = None) -> bool:
        """For what was submitted. Returns whether all of it is on the Hub."""
        thread = self.thread
        if thread is not None:
            thread.join(seconds)
        return self.thread is None and self.failed is None

    def stop(self) -> None:
        """At a signal: what is on its way gets a little time."""
        if not self.wait(SECONDS_TO_STOP):
            say(
                f"warning: the newest checkpoint is not on the Hub; the run that goes on from it pushes to {self.repo}"
            )

    def finish(self, output_dir: str) -> bool:
        """Model, card, figures and results, after all was written. Returns whether they are there."""
        say(f"pushing the trained model to {self.repo}")
        self.wait()
        staged = self.folder / "final"
        shutil.rmtree(staged, ignore_errors=True)
        try:
            stage(Path(output_dir), staged, (*MODEL, *REPORT))
            problem = self.attempt("trained", staged)
        except OSError as error:
            problem = str(error)
        if problem is not None:
            say(
                f"warning: the trained model is not on the Hub yet ({problem}). All of it is here; this completes it: "
                f"hf upload {self.repo} {staged} ."
            )
            return False
        shutil.rmtree(self.folder, ignore_errors=True)
        say(f"pushed: {self.api.endpoint}/{self.repo}")
        return True


def stage(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Hard links where the file system has them: no room, and what a later save replaces stays as it was."""
    for pattern in patterns:
        for path in sorted(path for path in source.glob(pattern) if path.is_file()):
            linked = target / path.relative_to(source)
            linked.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, linked)
            except OSError:
                shutil.copy2(path, linked)


def fetch(repo: str, output_dir: str) -> Path:
    """The Hub's last-checkpoint/ as a checkpoint of this folder.

    Raises:
        UserError: there is none, it isn't whole, or it can't be read.
    """
    limit_waiting()
    aside = Path(output_dir, f"{files.INCOMPLETE}from-hub")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        patiently(lambda: snapshot_download(repo, allow_patterns=f"{LAST}/**", local_dir=aside))
    except Exception as error:  # whatever the client and its network raise
        raise UserError(f"resume_from_checkpoint: {repo!r} can't be read from the Hub: {reason(error)}") from None
    found = aside / LAST
    if not found.is_dir():
        raise UserError(
            f"resume_from_checkpoint: {repo!r} has no {LAST}/ on the Hub; --hub_strategy checkpoint pushes one"
        )
    if problem := files.what_is_wrong(found):
        raise UserError(f"resume_from_checkpoint: {LAST}/ of {repo!r} is not whole: {problem}")
    checkpoint = files.folder_of(output_dir, files.recorded_update(found))
    if files.what_is_wrong(checkpoint) is not None:
        shutil.rmtree(checkpoint, ignore_errors=True)
        found.rename(checkpoint)
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint


def reason(error: Exception) -> str:
    """One line without the request's address and number; a client's error has no token in it."""
    response = getattr(error, "response", None)
    if response is not None:
        said = response.headers.get("X-Error-Message") or response.reason_phrase
        return f"{response.status_code}: {said}"
    cause: BaseException | None = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return first_line(cause)


def first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

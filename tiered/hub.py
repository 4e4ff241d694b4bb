"""Files of the Hugging Face hub, through faults: retries that wait, whole files, checked contents.

The clients give up on one 503, one dropped HEAD, one failed call of the API, and retry a stalled
stream for tens of minutes: here every request is tried again while its fault may pass, and a file
is fetched whole within a time limit before anything of it is read.
"""

import contextlib
import hashlib
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download
from huggingface_hub.utils import filter_repo_objects
from tqdm import tqdm

from tiered.store import UserError, digest, file_hash, remove_abandoned, temporary_of

URL = re.compile(r"hf://datasets/(?P<repo>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)")
TRIES = 7  # of a request: waits of 1, 2, 4 .. 32 seconds, a minute together
WAIT = 1.0  # seconds, the first
LONGEST_WAIT = 120.0  # seconds, whatever the hub asks for
FILE_SECONDS = 1800.0  # within which a file has to arrive

# its native transfers cannot be interrupted when they stall
constants.HF_HUB_DISABLE_XET = True

Result = TypeVar("Result")


class BadFile(OSError):
    """A file that arrived is not the one the hub has."""


def passing(error: BaseException) -> bool:
    """Whether a fault may be gone at the next try."""
    if constants.HF_HUB_OFFLINE or isinstance(error, errors.OfflineModeIsEnabled):
        return False
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 503
        return status in (408, 429) or status >= 500
    if isinstance(error, errors.LocalEntryNotFoundError):  # it could not ask the hub, or was told
        return not isinstance(error.__cause__, errors.HfHubHTTPError) or passing(error.__cause__)
    return isinstance(error, httpx2.TransportError | ConnectionError | TimeoutError | BadFile)


def patiently(what: str, action: Callable[[], Result]) -> Result:
    """The result of an action that asks the hub, tried again with growing waits while its fault may
    pass.

    Raises UserError after TRIES tries; other errors as they are.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except UserError:  # has had its tries
            raise
        except Exception as error:
            fault = _fault(error)
            if not passing(fault):
                definite = isinstance(error.__cause__, errors.HfHubHTTPError)
                raise (error.__cause__ if definite else error) from None
            said = f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
            if attempt == TRIES:
                raise UserError(
                    f"{what}: no answer from the hub after {TRIES} tries ({said}); what is finished"
                    " is kept, run again"
                ) from None
            seconds = min(LONGEST_WAIT, max(WAIT * 2 ** (attempt - 1), _asked_for(fault)))
            tqdm.write(f"{what}: {said}; try {attempt + 1} in {seconds:g} s", file=sys.stderr)
            time.sleep(seconds)
    raise AssertionError("unreachable")


def _fault(error: BaseException) -> BaseException:
    """The error of the network that an error was made of, or the error itself."""
    seen: BaseException | None = error
    while seen is not None:
        if passing(seen):
            return seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return error


def _asked_for(error: BaseException) -> float:
    """Seconds that the hub asks to wait for (Retry-After)."""
    response = getattr(error, "response", None)
    value = response.headers.get("Retry-After", "") if response is not None else ""
    return float(value) if value.replace(".", "", 1).isdigit() else 0.0


def exists(repo: str, revision: str) -> bool:
    """Whether the hub has a dataset at a revision (empty: its default branch), for this user."""
    try:
        patiently(repo, lambda: HfApi().dataset_info(repo, revision=revision or None))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        return False
    return True


def snapshot(repo: str, revision: str, patterns: list[str]) -> str:
    """The folder with all files of a model repository whose names match, at one commit.

    Raises UserError where the hub does not answer, the client's errors where it says no.
    """
    if constants.HF_HUB_OFFLINE:  # what is in the cache
        return snapshot_download(repo, revision=revision or None, allow_patterns=patterns)

    def download() -> str:
        info = HfApi().model_info(repo, revision=revision or None)
        folder = snapshot_download(repo, revision=info.sha, allow_patterns=patterns)
        names = filter_repo_objects([f.rfilename for f in info.siblings], allow_patterns=patterns)
        # a client that loses the hub on the way is content with what it has got
        absent = [name for name in names if not (Path(folder) / name).is_file()]
        if absent:
            raise BadFile(f"{absent[0]} did not arrive")
        return folder

    return patiently(repo, download)


@contextlib.contextmanager
def fetched(url: str, folder: Path) -> Iterator[Path]:
    """A file of the hub as a path below `folder`, whole and checked; removed in the end.

    A download that was cut off goes on where it stopped. Raises UserError.
    """
    name = URL.fullmatch(url)
    # of its own: another process may fetch the same file for another config
    own = temporary_of(folder / digest(url))
    remove_abandoned(folder)
    repo, revision, path = name["repo"], name["revision"], name["path"]
    if ".." in Path(path).parts or Path(path).is_absolute():  # the client would write there
        raise UserError(f"{url}: leads out of the folder of downloads")

    def download() -> Path:
        with time_limit(FILE_SECONDS):
            got = hf_hub_download(repo, path, repo_type="dataset", revision=revision, local_dir=own)
        check_file(Path(got), repo, revision, path)
        return Path(got)

    try:
        file = patiently(url, download)
    except UserError:
        shutil.rmtree(own, ignore_errors=True)
        raise
    except (OSError, httpx2.HTTPError) as error:
        shutil.rmtree(own, ignore_errors=True)
        raise UserError(f"{url}: cannot be fetched ({' '.join(str(error).split())})") from None
    try:
        yield file
    finally:
        shutil.rmtree(own, ignore_errors=True)


def check_file(file: Path, repo: str, revision: str, path: str) -> None:
    """Compare a file with what the hub says of it; it is removed where they differ (BadFile)."""
    found = HfApi().get_paths_info(repo, path, revision=revision, repo_type="dataset")
    if not found:
        raise BadFile(f"{path}: the hub says nothing of it")
    (info,) = found
    if info.lfs is not None:
        expected, found = info.lfs.sha256, file_hash(file)
    else:  # git's own hash
        content = file.read_bytes()
        expected = info.blob_id
        found = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    if found != expected:
        file.unlink()
        raise BadFile(f"{path}: hash {found[:16]} arrived, the hub has {expected[:16]}")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread once the body has taken so long; a stalled transfer waits for
    ever otherwise."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not there after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

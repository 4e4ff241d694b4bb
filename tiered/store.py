"""What makes a stage safe to kill: hashes, atomic files and folders, complete-or-absent artefacts.

An artefact is a folder addressed by the hash of its inputs. It is written under a temporary name
beside its place, flushed to disk and renamed, with `hashes.json` (file -> sha256) inside, so a
folder under its final name is complete by construction and a damaged one is noticed when read.
"""

import ast
import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HASHES = "hashes.json"
# What differs between two equal runs (time, memory, host, date) lives in this file alone.
TOKENIZER_RECORD = "tokenizer_record.json"  # beside a tokenizer: which domains trained it
TIMINGS = "timings.json"
UNHASHED = (HASHES, TIMINGS)
OBSERVED = "observed.jsonl"  # beside a model whose training was watched
EXPERTS_FORMAT = 1  # of eval/experts.json: another number wherever what its pages read changes
SEAL = "sha256"  # last entry of a JSON mapping of ours: the hash of all others
INITIAL_SPACE = 0xEFFFFFFC  # of process numbers: Linux' for all that runs in no container
ABANDONED = 86_400.0  # seconds without a write after which another machine's writer counts as dead


class UserError(ValueError):
    """A mistake at a border (config, file, command line): printed as one line, exit code 2."""


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any, length: int = 16) -> str:
    """First `length` hexadecimal digits of the sha256 of the value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def seed_of(*parts: Any) -> int:
    """A 31-bit seed that is a function of its parts alone (never of what ran before)."""
    return int(digest(list(parts)), 16) % (2**31 - 1)


@functools.cache
def code_hash(*names: str) -> str:
    """Hash of what source files of this project do: comments, docstrings and layout do not count.

    Part of every artefact's address: edited code never meets what its former self has made.
    """
    trees = []
    for name in sorted(names):
        tree = ast.parse((Path(__file__).parents[1] / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
            if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        trees.append(ast.dump(tree))
    return digest(trees)


_file_hashes: dict[tuple[int, ...], str] = {}
_SETTLED = 2.0  # seconds: a file written later than this before its hash is hashed again


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes; read once in a process while inode, size and times stay the same.

    Most artefacts are hard links to few files, each verified through many names. The times of a
    file just written cannot tell a second write in the same clock tick: its hash is not kept.
    """
    with open(path, "rb") as file:
        now, state = time.time(), os.fstat(file.fileno())
        key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        if key in _file_hashes:
            return _file_hashes[key]
        value = hashlib.file_digest(file, "sha256").hexdigest()
    if now - max(state.st_mtime, state.st_ctime) > _SETTLED:
        _file_hashes[key] = value
    return value


def read_json(path: Path) -> Any:
    """The JSON value of a file, without its seal; a missing or damaged file is a UserError that
    names it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: file is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if isinstance(value, dict) and value:
        if SEAL in value and value.pop(SEAL) != digest(value, 64):
            raise damaged(path)
        if value and _one_bit_off(next(reversed(value)), SEAL):
            raise damaged(path)
    return value


def _one_bit_off(text: str, other: str) -> bool:
    pairs = zip(text.encode(), other.encode(), strict=False)
    return len(text) == len(other) and sum((a ^ b).bit_count() for a, b in pairs) == 1


def damaged(path: Path) -> UserError:
    """What is said of a file that is not as it was written."""
    return UserError(
        f"{path}: changed since it was written; remove it and run the stage that makes it again"
    )


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def machine() -> str:
    """Where this process' number means something: the host's name and, in a container, its own."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = INITIAL_SPACE
    return platform.node() + (f".{space}" if space != INITIAL_SPACE else "")


def temporary_of(path: Path, kind: str = "tmp") -> Path:
    """Where a file or folder is written before it gets its name: beside it, named after the writer
    (process and machine: several may share a file system)."""
    return path.with_name(f".{path.name}.{kind}{os.getpid()}@{machine()}")


@contextlib.contextmanager
def atomic_file(path: Path, once: bool = False) -> Iterator[Path]:
    """Yield a temporary name that becomes `path`, flushed, if the body succeeds: the old content
    stands until the new one is complete on disk. What a killed writer of the file left is removed.

    once: a file that another process has made meanwhile stands.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, path.name)
    temporary = temporary_of(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if not (once and _linked(temporary, path)):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _linked(source: Path, path: Path) -> bool:
    """Whether `path` is there now, by this link or before it; not on file systems without links."""
    try:
        os.link(source, path)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_sealed(path: Path, text: str) -> None:
    """Write text whose format has `#` comments, atomically, with its hash as a last comment."""
    write_text(path, f"{text}# {SEAL} of the above: {_text_hash(text)}\n")


def read_sealed(path: Path) -> str:
    """What `write_sealed` wrote; UserError where it is no longer that."""
    try:
        text, _, seal = path.read_text(encoding="utf-8").rpartition("# ")
    except FileNotFoundError:
        raise UserError(f"{path}: file is missing") from None
    except UnicodeDecodeError:
        raise damaged(path) from None
    if seal != f"{SEAL} of the above: {_text_hash(text)}\n":
        raise damaged(path)
    return text


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, atomically; NaN is refused (write None or a word).

    A mapping is sealed: its last entry is the hash of the others, by which `read_json` sees that
    a bit has changed.
    """
    write_text(path, _json_text(value))


def _json_text(value: Any) -> str:
    if isinstance(value, dict):
        plain = json.loads(json.dumps(value, allow_nan=False))  # keys as they will be read
        value = {**value, SEAL: digest(plain, 64)}
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_json_once(path: Path, value: Any) -> Any:
    """Write a value unless the file is there; what the file holds then, for all who call this."""
    if not path.is_file():
        with atomic_file(path, once=True) as temporary:
            temporary.write_text(_json_text(value), encoding="utf-8")
    return read_json(path)


def tree_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative path, sorted; timings are left out."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in UNHASHED)
    return {p.relative_to(folder).as_posix(): file_hash(p) for p in files}


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder`, hashed and flushed, if the body succeeds.

    If the body fails the temporary folder is removed; if the process is killed it stays as
    `.<name>.tmp<pid>@<host>` and the next writer of the same folder removes it.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    temporary = temporary_of(folder)
    temporary.mkdir()
    try:
        yield temporary
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, folder: Path) -> None:
    """Hash, flush and rename a finished temporary folder to its place, replacing an old one."""
    write_json(temporary / HASHES, tree_hashes(temporary))
    for path in temporary.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _take_place(temporary, folder)
    _sync_folder(folder.parent)


def _take_place(temporary: Path, folder: Path) -> None:
    """Rename a folder, replacing an old one."""
    aside = temporary_of(folder, "old")
    while True:
        try:
            os.replace(temporary, folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # rename cannot replace a non-empty folder: the old one, or that of another writer who was
        # quicker, is moved aside first
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed writer of `folder` left behind; a living writer's folder is kept, one of
    another machine's while it is not older than ABANDONED."""
    remove_abandoned(folder.parent, folder.name)
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.old*"):
        # killed between the two renames of `publish`: the old folder is the complete one.
        if _writer_lives(path, ".old"):
            continue
        if folder.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # another process is at it
                os.replace(path, folder)


def remove_abandoned(folder: Path, name: str = "*") -> None:
    """Remove from a folder what killed writers of its files and folders left behind; name: of one
    of them."""
    for path in folder.glob(f".{name if name == '*' else glob.escape(name)}.tmp*"):
        living = _writer_lives(path, ".tmp")
        if not living and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif not living:
            path.unlink(missing_ok=True)


def _writer_lives(path: Path, kind: str) -> bool:
    """Whether another process is at a temporary file or folder, by its name."""
    process, _, where = path.name.rpartition(kind)[2].partition("@")
    if where and where != machine():
        return _age(path) < ABANDONED
    return process.isdigit() and int(process) != os.getpid() and process_alive(int(process))


def _age(folder: Path) -> float:
    """Seconds since something in a folder was last written, by the clock of its file system (that
    of this machine may be days off)."""
    try:
        with tempfile.TemporaryFile(dir=folder.parent) as file:
            now = os.fstat(file.fileno()).st_mtime
        return now - max(p.stat().st_mtime for p in (folder, *folder.rglob("*")))
    except FileNotFoundError:  # it is being written, or removed
        return 0.0


def process_alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for yet does not."""
    try:
        os.kill(process, 0)
        # after the name in parentheses, which may hold anything: the state, Z for such a one
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()  # it has just ended, or there is no /proc here
    except OSError:  # another user's
        return True
    return state not in "ZX"


def is_complete(folder: Path) -> bool:
    """Whether a folder was published (its hash list is there)."""
    return (Path(folder) / HASHES).is_file()


def verify(folder: Path) -> str:
    """Hash of a published folder's content, after comparing every file with the hash list.

    Raises UserError naming the first file that is missing, changed or not listed.
    """
    folder = Path(folder)
    if not is_complete(folder):
        raise UserError(f"{folder}: incomplete or not made by this project ({HASHES} is missing)")
    expected, found = read_json(folder / HASHES), tree_hashes(folder)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            state = "missing" if name not in found else "changed since it was written"
            state = state if name in expected else "not in the hash list"
            raise UserError(
                f"{folder / name}: {state}; remove the folder and run the stage that makes it again"
            )
    return digest(expected)


def verified(folder: Path, name: str) -> Path:
    """The path of one file of a published folder, after comparing it with the hash list."""
    path = Path(folder) / name
    if read_json(Path(folder) / HASHES).get(name) != (file_hash(path) if path.is_file() else None):
        raise damaged(path)
    return path


def content_hash(folder: Path) -> str:
    """Hash of a published folder's content as recorded when it was written."""
    return digest(read_json(Path(folder) / HASHES))


def link_tree(source: Path, target: Path) -> None:
    """Make `target` a copy of `source` by hard links (plain copies across file systems)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    temporary = temporary_of(target)
    try:
        shutil.copytree(source, temporary, copy_function=_link_or_copy)
        _take_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link_if_changed(source: Path, target: Path) -> None:
    """Make `target` the published folder `source` by hard links, unless its content is the same.

    A damaged target is replaced.
    """
    try:
        same = verify(target) == content_hash(source)
    except UserError:
        same = False
    if not same:
        link_tree(source, target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)

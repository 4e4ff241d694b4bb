"""Atomic artefacts: complete or absent, damaged ones noticed, old content kept on failure."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tiered import store
from tiered.store import (
    UserError,
    atomic_folder,
    content_hash,
    digest,
    is_complete,
    link_if_changed,
    link_tree,
    read_json,
    seed_of,
    verify,
    write_json,
    write_text,
)


def make(folder, text="one"):
    with atomic_folder(folder) as path:
        (path / "sub").mkdir()
        (path / "sub" / "a.txt").write_text(text)
    return folder


def test_a_failed_body_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "x") as path:
        (path / "half").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_is_cleaned_up_and_a_living_one_is_kept(tmp_path):
    here = store.machine()
    dead = tmp_path / f".x.tmp4194305@{here}"  # above the largest process id of Linux
    alive = tmp_path / f".x.tmp{os.getppid()}@{here}"
    dead.mkdir()
    alive.mkdir()
    make(tmp_path / "x")
    assert not dead.exists() and alive.exists()


@pytest.mark.parametrize("days_off", [0, 3, -3])
def test_another_machines_writer_is_kept_for_a_day(days_off, tmp_path, monkeypatch):
    """Process ids say nothing there: this one is that of no process here. Nor does this machine's
    clock."""
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + days_off * 86_400)
    young, old = (tmp_path / f".x.tmp4194305@{name}" for name in ("a", "b"))
    for path in (young, old):
        path.mkdir()
        (path / "file").write_text("half")
    for path in (old, old / "file"):
        os.utime(path, (clock() - store.ABANDONED - 9,) * 2)
    make(tmp_path / "x")
    assert young.exists() and not old.exists()
    (tmp_path / f".y.json.tmp4194305@{store.machine()}").write_text("half a file")
    store.remove_abandoned(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [young.name, "x"]


def test_a_writer_who_was_quicker_is_replaced(tmp_path, monkeypatch):
    """Two that publish one folder at a time: the second finds it there when it renames its own."""
    replace, calls = os.replace, []

    def slow(source, target):
        calls.append(target)
        if len(calls) == 1:
            make_aside = tmp_path / "quicker"
            make_aside.mkdir()
            (make_aside / "file").write_text("theirs")
            replace(make_aside, tmp_path / "x")
        return replace(source, target)

    temporary = tmp_path / "own"
    (temporary / "sub").mkdir(parents=True)
    (temporary / "sub/a.txt").write_text("ours")
    store.write_json(temporary / "hashes.json", {})
    calls.clear()
    monkeypatch.setattr(
        os, "replace", lambda a, b: slow(a, b) if b == tmp_path / "x" else replace(a, b)
    )
    store.publish(temporary, tmp_path / "x")
    assert (tmp_path / "x/sub/a.txt").read_text() == "ours" and verify(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_writer_that_ended_and_was_not_waited_for_is_cleaned_up(tmp_path):
    ended = subprocess.Popen(["true"])
    stat = Path(f"/proc/{ended.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    left = tmp_path / f".a.tmp{ended.pid}@{store.machine()}"
    left.mkdir()
    store.remove_leftovers(tmp_path / "a")
    assert not left.exists()
    ended.wait()


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    make(tmp_path / "x", "old")
    os.replace(tmp_path / "x", tmp_path / f".x.old4194305@{store.machine()}")
    make(tmp_path / "x", "new")
    assert (tmp_path / "x/sub/a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_many_links_to_one_place_leave_it_whole(tmp_path):
    """Several processes link folders to one name, again and again: it is always one of them."""
    for name in ("a", "b"):
        make(tmp_path / name, name)
    code = """
        import sys
        from pathlib import Path
        from tiered.store import link_tree
        for _ in range(150):
            link_tree(Path(sys.argv[1]), Path(sys.argv[2]))
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code)]
    target = tmp_path / "target"
    environment = {**os.environ, "PYTHONPATH": str(Path(store.__file__).parents[1])}
    processes = [
        subprocess.Popen([*arguments, tmp_path / name, target], env=environment)
        for name in ("a", "b", "a")
    ]
    assert [p.wait(timeout=120) for p in processes] == [0, 0, 0]
    verify(target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "target"]


def test_verify_names_the_changed_missing_or_extra_file(tmp_path):
    folder = make(tmp_path / "x")
    good = verify(folder)
    assert good == content_hash(folder)
    (folder / "sub" / "a.txt").write_text("onf")
    with pytest.raises(UserError, match=r"sub/a\.txt: changed"):
        verify(folder)
    (folder / "sub" / "a.txt").unlink()
    with pytest.raises(UserError, match=r"sub/a\.txt: missing"):
        verify(folder)
    make(folder)
    (folder / "b.txt").write_text("")
    with pytest.raises(UserError, match=r"b\.txt: not in the hash list"):
        verify(folder)


def test_a_file_is_hashed_once_while_it_stays_and_anew_when_it_changed(tmp_path, monkeypatch):
    path, link = tmp_path / "a", tmp_path / "b"
    path.write_text("one")
    os.link(path, link)
    old = store.file_hash(path)
    reads = []
    digest_of = store.hashlib.file_digest
    monkeypatch.setattr(store.hashlib, "file_digest", lambda *a: reads.append(a) or digest_of(*a))
    assert (store.file_hash(path), len(reads)) == (old, 1)  # young: not remembered
    monkeypatch.setattr(store, "_SETTLED", -1.0)
    assert [store.file_hash(path) for _ in range(3)] == [old] * 3 and len(reads) == 2
    assert (store.file_hash(link), len(reads)) == (old, 2)  # the same file by another name
    # the same size and the same modification time: the time of change still tells
    times = path.stat()
    time.sleep(0.02)
    path.write_text("two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert store.file_hash(path) == store.file_hash(link) != old and len(reads) == 3


def test_content_hash_depends_on_content_alone(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "elsewhere" / "b")
    assert content_hash(a) == content_hash(b) != content_hash(make(tmp_path / "c", "two"))


def test_linked_tree_shares_content_and_survives_removal_of_the_source(tmp_path):
    source = make(tmp_path / "a")
    link_tree(source, tmp_path / "b")
    assert (tmp_path / "b/sub/a.txt").stat().st_ino == (source / "sub/a.txt").stat().st_ino
    make(source, "two")  # replaced by rename: the link keeps the old content
    assert (tmp_path / "b/sub/a.txt").read_text() == "one"
    assert is_complete(tmp_path / "b") and verify(tmp_path / "b")


def test_a_changed_or_damaged_copy_is_linked_anew(tmp_path):
    source, copy = make(tmp_path / "a"), tmp_path / "b"
    link_if_changed(source, copy)
    kept = (copy / "sub").stat().st_ino
    link_if_changed(source, copy)
    assert (copy / "sub").stat().st_ino == kept
    (copy / "sub/a.txt").unlink()
    (copy / "sub/a.txt").write_text("bad")  # the hash list still says otherwise
    link_if_changed(source, copy)
    assert verify(copy) == content_hash(source)
    link_if_changed(make(source, "two"), copy)
    assert (copy / "sub/a.txt").read_text() == "two"


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_not_a_number_is_never_written(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_digest_ignores_key_order_and_seeds_follow_their_parts():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert seed_of(0, "train", ["hi"]) == seed_of(0, "train", ["hi"])
    seeds = {seed_of(0, "train", [k]) for k in range(200)} | {seed_of(1, "train", [0])}
    assert len(seeds) == 201 and all(0 <= s < 2**31 for s in seeds)


def test_write_text_creates_folders(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "x")
    assert (tmp_path / "a" / "b.txt").read_text() == "x"


def test_code_hash_sees_what_code_does_and_not_how_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(store, "__file__", str(tmp_path / "package/store.py"))

    def hashed(text: str) -> str:
        (tmp_path / "a.py").write_text(text)
        store.code_hash.cache_clear()
        return store.code_hash("a.py")

    first = hashed('"""Doc."""\ndef f(x):\n    """Doc."""\n    return x + 1  # why\n')
    assert first == hashed("def f( x ):\n\n    return (x+1)\n")
    assert first != hashed("def f(x):\n    return x + 2\n")
    store.code_hash.cache_clear()

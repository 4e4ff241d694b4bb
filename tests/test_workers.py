"""Work spread over processes: the same calls, and errors that come back as one line."""

import os
import signal

import pytest
from torch.utils.data import DataLoader

from tiered import stopping
from tiered.store import UserError, read_json, write_text
from tiered.workers import in_worker, processes, run_all


@pytest.mark.parametrize("count", [1, 2])
def test_every_call_is_made_once(count, tmp_path):
    calls = [(write_text, tmp_path / str(i), str(i)) for i in range(5)]
    with processes(count) as pool:
        assert (pool is None) == (count == 1)
        run_all(calls, pool, "write", "file")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {str(i): str(i) for i in range(5)}
    assert not in_worker()


def test_a_user_error_in_a_worker_and_a_dead_worker_are_user_errors(tmp_path):
    with processes(2) as pool, pytest.raises(UserError, match=r"nowhere\.json: file is missing"):
        run_all([(read_json, tmp_path / "nowhere.json")] * 3, pool, "read", "file")
    with processes(2) as pool, pytest.raises(UserError, match="a worker process died"):
        run_all([(os._exit, 1)], pool, "exit", "call")


def test_a_training_that_is_asked_to_end_is_fed_to_its_next_step(monkeypatch):
    """The processes that load its batches are not ended before it."""
    monkeypatch.setattr(stopping._State, "asked", False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        stopping.install()
        with stopping.patiently_ended():
            batches = iter(DataLoader(range(400), batch_size=1, num_workers=2))
            found = [int(next(batches))]
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopping.asked()
            found += [int(batch) for batch in batches]
        assert found == list(range(400))
    finally:
        signal.signal(signal.SIGTERM, before)

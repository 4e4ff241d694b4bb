"""The hub through its faults: equal data, or one clear line, and the next run goes on."""

import json
import subprocess
import sys

import httpx2
import pytest
from huggingface_hub import errors
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.hub_server import COMMIT
from tests.test_config import ROOT
from tests.test_processing import make_texts, write_lines
from tiered import hub
from tiered.store import UserError


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    root, output = (tmp_path_factory.mktemp(name) for name in ("repositories", "output"))
    texts = make_texts("en", 90)
    for i in range(3):
        write_lines(root / f"c4/en/part-{i}.json.gz", texts[30 * i : 30 * i + 30])
    readme = "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n"
    (root / "c4/README.md").write_text(readme + "    path: en/*.json.gz\n---\n")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "."]
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces += [*letters, *("##" + c for c in letters)]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(root / "words")
    (root / "words/config.json").write_text('{"model_type": "bert"}')
    command = [sys.executable, "-m", "tests.hub_cases", str(root), str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "results.json").read_text())


def test_a_fault_that_passes_changes_nothing(results):
    calm = results["once"]["calm"]
    url = f"hf://datasets/calm/c4@{COMMIT}/en/part-1.json.gz"
    assert calm["revision"] == COMMIT and url in calm["files"]
    for case, found in results["once"].items():
        assert found.get("splits") == calm["splits"], (case, found)
        assert found["struck"] and found["left"] == [], case


def test_a_fault_that_lasts_is_one_line_and_the_next_run_goes_on(results):
    for case, found in results["lasting"].items():
        assert "error" in found and "\n" not in found["error"], case
    said = {case: found["error"] for case, found in results["lasting"].items()}
    assert "part-1.json.gz: no answer from the hub after 7 tries" in said["503 file"]
    assert "503" in said["503 api"] and "after 7 tries" in said["503 api"]
    assert "the hub has" in said["other file"]
    assert "neither a folder here nor reachable on the hub" in said["absent"]
    calm = results["once"]["calm"]
    for case, found in results["healed"].items():
        assert found["splits"] == calm["splits"], case
    # part-0 is not fetched again
    assert results["healed"]["503 file"]["requests"] < calm["requests"]


def test_a_tokenizer_is_never_another_one(results):
    calm = results["tokenizer"]["calm"]["tokenizer"]
    for case, found in results["tokenizer"].items():
        assert found.get("tokenizer") == calm and found["struck"], (case, found)


def answer(status: int) -> errors.HfHubHTTPError:
    request = httpx2.Request("HEAD", "http://127.0.0.1/x")
    return errors.HfHubHTTPError(f"{status}", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(("status", "tries"), [(403, 1), (404, 1), (400, 1), (503, hub.TRIES)])
def test_a_definite_answer_is_not_asked_for_again(status, tries, monkeypatch):
    """The client wraps the answer to a HEAD in an error that also stands for no answer."""
    monkeypatch.setattr(hub, "WAIT", 0.0)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    calls = []

    def ask():
        calls.append(1)
        raise errors.LocalEntryNotFoundError("cannot find it") from answer(status)

    with pytest.raises(
        (errors.HfHubHTTPError, UserError), match=f"{status}|no answer from the hub after"
    ):
        hub.patiently("x", ask)
    assert len(calls) == tries


def test_tries_do_not_nest(monkeypatch):
    monkeypatch.setattr(hub, "WAIT", 0.0)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    calls = []

    def inner():
        calls.append(1)
        raise ConnectionError("gone")

    def outer():
        try:
            raise FileNotFoundError
        except FileNotFoundError:
            hub.patiently("inner", inner)

    with pytest.raises(UserError, match="inner: no answer from the hub after 7 tries"):
        hub.patiently("outer", outer)
    assert len(calls) == hub.TRIES

"""What a config, a folder or a hub from elsewhere cannot do: write outside, run code, take keys."""

import ast
import importlib.metadata
import json
import shutil
import zipfile
from pathlib import Path

import datasets
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import ROOT, run_stages
from tiered import hub
from tiered.config import load
from tiered.data import ProcessedData
from tiered.store import UserError
from tiered.tokenization import load_tokenizer
from tiered.unlearning.benchmark import forget_set

OUTSIDE = (
    "../up",
    "/abs",
    "a/b",
    "..",
    ".",
    ".store",
    "",
    "a b",
    "a;b",
    "$(a)",
    "a\nb",
    "-rf",
    "a" * 101,
)


def config_file(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [*OUTSIDE, "report"])
def test_a_run_stays_in_the_output_folder(name, tmp_path):
    path = config_file(tmp_path, yaml.safe_dump({"name": name}))
    with pytest.raises(UserError, match="name: "):
        load(path)


@pytest.mark.parametrize("name", [*OUTSIDE, "tokenizer", "manifest.json"])
def test_a_domain_stays_in_the_data_folder(name, tmp_path):
    content = {"name": "c", "data": {"domains": ["hi", name]}}
    with pytest.raises(UserError, match=r"data\.domains: "):
        load(config_file(tmp_path, yaml.safe_dump(content)))


@pytest.mark.parametrize("name", ["..txt", "a b.txt", "alone.json.txt", "-x.txt"])
def test_a_forget_set_stays_in_its_folder(name, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny)
    config = load("configs/n2.yaml")
    data = ProcessedData(config)
    listed = tmp_path / name
    listed.write_text(f"hi/{data.document_ids('hi', 'train')[0]}\n")
    with pytest.raises(UserError, match=r"unlearn\.forget: "):
        forget_set(config, data, str(listed))
    assert forget_set(config, data, str(listed.rename(tmp_path / "some.txt"))).name == "some"


@pytest.mark.parametrize("path", ["../../x", "a/../../x", "/etc/x"])
def test_a_hub_cannot_name_a_file_outside_the_downloads(path, tmp_path):
    with (
        pytest.raises(UserError, match="leads out of the folder"),
        hub.fetched(f"hf://datasets/o/n@main/{path}", tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.system ['touch {0}']\n",
        "name: c\ndata: !!python/object/new:os.system ['touch {0}']\n",
    ],
)
def test_yaml_makes_no_objects(text, tmp_path):
    marker = tmp_path / "ran"
    with pytest.raises(UserError, match="not valid YAML"):
        load(config_file(tmp_path, text.format(marker)))
    assert not marker.exists()


def sources() -> list[Path]:
    return [*ROOT.glob("*.py"), *(ROOT / "tiered").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]


def test_no_call_trusts_code_that_comes_with_data_or_models():
    """No keyword trust_remote_code, no unsafe loader, no eval, no shell in any of our calls."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            assert "trust_remote_code" not in keywords, (path, node.lineno)
            where = f"{path}, line {node.lineno}: {name}"
            last = name.rpartition(".")[2]
            assert name not in ("eval", "exec", "os.system", "os.popen", "torch.load"), where
            assert last not in ("unsafe_load", "full_load", "popen", "system"), where
            assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.")), where
            assert "shell" not in keywords, where
            if name.startswith("subprocess.") and node.args:
                assert not isinstance(node.args[0], ast.Constant), where
                assert ast.unparse(node.args[0])[:6] not in ("['sh',", "['bash"), where
            if name == "yaml.load":
                assert ast.unparse(keywords["Loader"]) == "_Loader", (path, node.lineno)


def with_code(folder: Path, marker: Path, **config) -> Path:
    """A model and tokenizer folder that brings code for every Auto class."""
    folder.mkdir()
    (folder / "bad.py").write_text(f"open({str(marker)!r}, 'w')\nclass Bad: pass\n")
    classes = {name: "bad.Bad" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModel")}
    content = {"model_type": "not_known", "auto_map": classes, **config}
    (folder / "config.json").write_text(json.dumps(content))
    tokenizer = {"auto_map": {"AutoTokenizer": ["bad.Bad", "bad.Bad"]}, "tokenizer_class": "Bad"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_folder_from_elsewhere_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    folder, marker = with_code(tmp_path / "model", tmp_path / "ran"), tmp_path / "ran"
    with pytest.raises(UserError, match=r"tokenizer\.name"):
        load_tokenizer(str(folder), "")
    for kind in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises((ValueError, OSError)):
            kind.from_pretrained(folder)
    data = tmp_path / "data"
    data.mkdir()
    (data / "data.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises((RuntimeError, FileNotFoundError, ValueError)):
        datasets.load_dataset(str(data))
    assert not marker.exists()


def test_nothing_that_is_stored_is_a_pickle(tiny):
    found = {}
    for root in ("processed", "runs"):
        for path in (tiny / root).rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    assert file.read(2) not in (
                        b"\x80\x02",
                        b"\x80\x03",
                        b"\x80\x04",
                        b"\x80\x05",
                    ), path
                assert not zipfile.is_zipfile(path), path  # what torch.save writes
                found.setdefault(path.suffix, path)
    assert found.keys() <= {
        *(".json", ".jsonl", ".safetensors", ".arrow", ".parquet", ".yaml", ".py", ".html"),
        *(".csv", ".md", ".svg", ".png", ".lock", ".txt"),
    }, found


def test_the_lock_file_is_within_the_ranges_and_complete():
    """Every range is met, and so is what those packages need here, and theirs."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = {
        canonicalize_name(name): Version(version)
        for name, version in (line.split("==") for line in lines if not line.startswith("#"))
    }
    wanted = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines()]
    seen = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        assert name in locked, requirement
        assert requirement.specifier.contains(locked[name], prereleases=True), requirement
        if name not in seen:
            seen.add(name)
            wanted += [
                r
                for r in map(Requirement, importlib.metadata.requires(name) or [])
                if not r.marker or r.marker.evaluate({"extra": ""})
            ]


def test_keys_of_the_environment_are_written_nowhere(tiny, tmp_path, monkeypatch):
    """Every stage with a tracker, offline: no file that was made, and no output, has the key."""
    secret = "0123456789abcdef" * 2 + "01234567"  # of the form that wandb takes
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_SECRET"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("configs", "processed", "raw"):
        shutil.copytree(tiny / name, tmp_path / name)
    stages = ("process_dset", "train_det_router", "run_clm", "eval_det_router")
    tracked = ("configs/n2.yaml", "training.report_to=[wandb]")
    output = run_stages(tmp_path, stages, *tracked, forked=False)  # it imports with the keys set
    assert secret not in output
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any("wandb" in p.parts for p in files), "the tracker was not at work"
    assert not [p for p in files if secret.encode() in p.read_bytes()]

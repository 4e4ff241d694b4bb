"""The config grammar: inheritance, overrides, types, and one clear line for every mistake."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiered.config import Config, as_yaml, help_text, load, parse_arguments, plain, valid_keys
from tiered.store import UserError, canonical_json

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_child_wins_and_mappings_merge_deeply(tmp_path):
    write(tmp_path / "a.yaml", "seed: 3\ndata: {block_size: 64, min_characters: 10}\n")
    write(tmp_path / "b.yaml", "base: a.yaml\ndata: {block_size: 96}\n")
    c = write(tmp_path / "sub/c.yaml", "base: ../b.yaml\nname: c\nrouter: {context_tokens: 9}\n")
    config = load(c)
    assert (config.seed, config.data.block_size, config.data.min_characters) == (3, 96, 10)
    assert config.router.context_tokens == 9


def test_several_bases_merge_in_order(tmp_path):
    write(tmp_path / "a.yaml", "seed: 1\nthreads: 1\n")
    write(tmp_path / "b.yaml", "seed: 2\n")
    config = load(write(tmp_path / "c.yaml", "base: [a.yaml, b.yaml]\nname: c\n"))
    assert (config.seed, config.threads) == (2, 1)


def test_an_empty_map_empties_the_base_and_an_empty_section_or_base_changes_nothing(tmp_path):
    write(tmp_path / "a.yaml", "data: {repeats: {4: 2}, block_size: 64}\n")
    config = load(write(tmp_path / "b.yaml", "base: a.yaml\nname: b\ndata: {repeats: {}}\n"))
    assert config.data.repeats == {} and config.data.block_size == 64
    config = load(write(tmp_path / "c.yaml", "base: a.yaml\nname: c\ndata: {}\n"))
    assert config.data.repeats == {4: 2}
    assert load(write(tmp_path / "d.yaml", "base:\nname: d\n")).name == "d"


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    path = write(tmp_path / "a.yaml", "name: a\ndata: {}\nseed: 1\ndata: {block_size: 64}\n")
    with pytest.raises(UserError, match="key `data` stands twice, line 4"):
        load(path)


def test_cycles_and_deep_chains_are_errors(tmp_path):
    write(tmp_path / "a.yaml", "base: b.yaml\nname: a\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    with pytest.raises(UserError, match="leads back to itself"):
        load(tmp_path / "a.yaml")
    for i in range(5):
        write(tmp_path / f"n{i}.yaml", f"name: x\nbase: n{i + 1}.yaml\n" if i < 4 else "name: x\n")
    with pytest.raises(UserError, match="more than 3 levels"):
        load(tmp_path / "n0.yaml")
    assert load(tmp_path / "n1.yaml").name == "x"


def test_overrides_come_last_and_values_get_the_type_of_their_field(tmp_path):
    path = write(tmp_path / "a.yaml", "name: a\ntraining: {learning_rate: 3e-4}\n")
    config = load(path, ("training.learning_rate=5e-4", "partition.n=16", "partition.index=3"))
    assert config.training.learning_rate == 5e-4
    assert config.partition.index == (3,)
    assert load(path).training.learning_rate == 3e-4
    assert load(path, ("partition.n=16", "partition.index=[2,1]")).partition.index == (2, 1)
    assert load(path, ("overwrite=true",)).overwrite is True


def test_norwegian_survives_yaml(tmp_path):
    path = write(
        tmp_path / "a.yaml", "name: a\ndata: {domains: [no, on, en], exclude_domains: no}\n"
    )
    assert load(path).data.domains == ("no", "on", "en")
    assert load(path).present_domains == ("on", "en")


def test_tokens_per_domain_is_a_number_or_a_map(tmp_path):
    path = write(tmp_path / "a.yaml", "name: a\ndata: {tokens_per_domain: {hi: 5, en: 7}}\n")
    assert load(path).data.tokens_per_domain == {"hi": 5, "en": 7}
    assert load(path, ("data.repeats={16: 8}",)).data.repeats == {16: 8}
    assert (
        load(
            write(tmp_path / "b.yaml", "name: b\n"), ("data.tokens_per_domain=9",)
        ).data.tokens_per_domain
        == 9
    )


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.blok_size=3", r"unknown key `data.blok_size`; did you mean `data.block_size`"),
        ("block_size=3", r"unknown key `block_size`; did you mean `data.block_size`"),
        ("training.lerning_rate=3", r"did you mean `training.learning_rate`"),
        ("training.warmup_ratioo=3", r"unknown key `training.warmup_ratioo`; did you mean"),
        ("training.seed=3", r"training.seed is not set here; use seed"),
        ("data=3", r"data is a section"),
        ("data.block_size=many", r"data.block_size: expected a whole number, found 'many'"),
        ("data.block_size=2", r"data.block_size: 2 is out of range \(at least 4\)"),
        (
            "data.min_script_share=1.5",
            r"data.min_script_share: 1.5 is out of range \(between 0 and 1\)",
        ),
        ("training.learning_rate=nan", r"training.learning_rate: expected a number, found 'nan'"),
        ("overwrite=maybe", r"overwrite: expected true or false, found 'maybe'"),
        ("partition.method=magic", r"'magic' is not one of language, family"),
        ("partition.index=4", r"partition.index: 4 is out of range \(partition.n is 1\)"),
        ("data.exclude_domains=xx", r"data.exclude_domains: 'xx' is not in data.domains"),
        ("unlearn.forget=xx", r"unlearn.forget: 'xx' is not in data.domains"),
        ("model.max_position_embeddings=64", r"data.block_size: 128 is beyond model.max_position"),
        ("name=../up", r"name: '../up' must be a plain name"),
        ("name=", r"name: an experiment needs a name"),
        ("data.domains=hi,hi", r"data.domains: names must be given, each once"),
        ("data.split_shares={train: 100}", r"data.split_shares: needs exactly the splits"),
        ("data.repeats={1: 5}", r"data.repeats: 1 must be at least 2"),
        ("data.repeats={4: -5}", r"data.repeats: 4 .*of at least 0 rows \(found -5\)"),
        ("unlearn.forget=hi,hi", r"unlearn.forget: each name once, found hi, hi"),
        ("eval.scopes=", r"eval.scopes: 'token' \(router.scope\) must be among them, found none"),
        ("eval.top_k=", r"eval.top_k: needs at least one value"),
        ("eval.scopes=oracle", r"eval.scopes: 'token' \(router.scope\) must be among them"),
        ("training.eval_strategy=steps", r"training.eval_strategy is not set here"),
        ("training.num_train_epochs=0", r"training.num_train_epochs: 0.0 is out of range"),
    ],
)
def test_every_mistake_is_one_line_with_key_and_allowed_values(tmp_path, override, message):
    path = write(tmp_path / "a.yaml", "name: a\n")
    with pytest.raises(UserError, match=message) as error:
        load(path, (override,))
    assert "\n" not in str(error.value)


def test_shares_must_sum_to_100(tmp_path):
    shares = "{train: 60, validation: 4, test: 8, router: 8, holdout: 16, calibration: 5}"
    path = write(tmp_path / "a.yaml", f"name: a\ndata: {{split_shares: {shares}}}\n")
    with pytest.raises(UserError, match="sum to 100, found 101"):
        load(path)
    messages = {"router": "the bpe tokenizer is trained on split", "train": "train must be above"}
    for empty, message in messages.items():
        shares = dict.fromkeys(("train", "test", "router", "holdout"), 25)
        shares |= {"validation": 0, "calibration": 25, empty: 0}
        with pytest.raises(UserError, match=message):
            load(path, (f"data.split_shares={json.dumps(shares)}",))


def test_unknown_key_in_a_base_names_the_file_that_has_it(tmp_path):
    write(tmp_path / "a.yaml", "sed: 3\n")
    with pytest.raises(UserError, match=r"a\.yaml: unknown key `sed`; did you mean `seed`"):
        load(write(tmp_path / "b.yaml", "base: a.yaml\nname: b\n"))


def test_training_accepts_every_training_argument_by_name(tmp_path):
    path = write(tmp_path / "a.yaml", "name: a\ntraining: {bf16: true, optim: adafactor}\n")
    config = load(path, ("training.adam_epsilon=1e-6",))
    assert config.training.arguments == {"bf16": True, "optim": "adafactor", "adam_epsilon": 1e-6}


def test_excluding_a_domain_changes_nothing_else(tmp_path):
    config = load(write(tmp_path / "a.yaml", "name: a\n"))
    without = config.without("hi")
    assert without.data.domains == config.data.domains
    assert without.present_domains == config.present_domains[1:]
    assert without.without("hi") == without


def test_two_configs_may_not_share_a_run_folder(tmp_path):
    a, b = (str(write(tmp_path / f"{x}.yaml", "name: same\n")) for x in "ab")
    with pytest.raises(UserError, match="two configs of this call write to"):
        parse_arguments([a, b], "doc")
    with pytest.raises(UserError, match="neither a config file"):
        parse_arguments([a, "--fast"], "doc")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_shipped_config_parses(path, tmp_path):
    overrides = () if "\nname:" in path.read_text(encoding="utf-8") else ("name=base",)
    config = load(path, overrides)
    assert config.name
    # the resolved config that a run folder holds is a config file too: equal to the last digit
    again = tmp_path / "config.yaml"
    again.write_text(as_yaml(config), encoding="utf-8")
    assert canonical_json(plain(load(again))) == canonical_json(plain(config))


def test_shipped_experiments_have_distinct_names():
    names = [load(p).name for p in SHIPPED if "\nname:" in "\n" + p.read_text(encoding="utf-8")]
    assert len(names) == len(set(names)) >= 3


def test_help_names_every_key_with_its_meaning():
    text = help_text("doc")
    for key, f in valid_keys(Config).items():
        assert f"  {key} (" in text
        assert len(f.metadata.get("help", "")) > 5, key


def test_every_field_is_read_somewhere():
    """A field nobody reads is deleted: each name occurs as an attribute outside of config.py,
    or its whole section is handed on (model and training, tested by their own config builders)."""
    read = set()
    files = [p for p in ROOT.glob("*.py")] + list((ROOT / "tiered").rglob("*.py"))
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
    handed_on = ("model.", "training.")
    unread = [
        key
        for key in valid_keys(Config)
        if key.rsplit(".", 1)[-1] not in read and not key.startswith(handed_on)
    ]
    assert unread == []


def test_a_typo_on_the_command_line_is_one_line_and_exit_code_2(tmp_path):
    path = write(tmp_path / "a.yaml", "name: a\n")
    code = (
        "from tiered.config import run_script\n"
        "run_script(lambda config: print(config.name), 'doc')\n"
    )
    script = write(tmp_path / "s.py", code)
    done = subprocess.run(
        [sys.executable, str(script), str(path), "data.blok_size=3"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "s.py: error:" in done.stderr

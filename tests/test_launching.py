"""Plans of experiments, run on this machine and by a real Slurm on localhost."""

import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_stages, tiny_project
from tests.test_config import SHIPPED
from tiered import local_run, plan
from tiered.config import load
from tiered.plan import Job, jobs, lines, parse
from tiered.store import UserError, read_json, tree_hashes

SITE = """
SITE_ALL=() SITE_CPU=(--cpus-per-task=1) SITE_GPU=(--cpus-per-task=1) SITE_SEVERAL=()
SITE_GPUS=1 SITE_READING_TASKS=2 SITE_CPU_LIMIT=2 SITE_GPU_LIMIT=2 SITE_GRACE=30
export HF_HUB_OFFLINE=1
site_prepare() { :; }
"""


def named(path: str, *overrides: str, reading_tasks: int = 0) -> dict[str, Job]:
    found = jobs(load(path, overrides), " ".join([path, *overrides]), reading_tasks)
    return {job.name: job for job in found}


def indices(job: Job) -> list[int]:
    return [int(c.rpartition("partition.index=")[2]) for c in job.commands]


# --- plans -----------------------------------------------------------------------------------


def test_every_shipped_config_has_a_plan_whose_jobs_wait_for_earlier_ones():
    experiments = [p for p in SHIPPED if "\nname:" in "\n" + p.read_text(encoding="utf-8")]
    assert len(experiments) > 60
    for path in experiments:
        seen: list[str] = []
        for job in named(str(path), reading_tasks=3).values():
            assert set(job.after) <= set(seen) and bool(job.after) == bool(seen), path
            assert job.commands and len(set(job.commands)) == len(job.commands), path
            seen.append(job.name)
        assert seen[:5] == ["read", "merge", "tokenise", "data", "router"], path
        assert seen[-1] == "report", path


def test_a_plan_trains_each_partition_that_has_data_and_forgets_each_set():
    path = "configs/c4/n16.yaml"
    found = named(path, "data.exclude_domains=[hi,de]", reading_tasks=8)
    members = [c.split("=")[-1] for c in found["train"].commands]
    assert len(members) == 14 and "0" not in members  # hi is the first of the sixteen
    assert found["train"].after == ("router",) and found["train"].several
    assert len(found["read"].commands) == 8 and len(found["tokenise"].commands) == 14
    found = named(path)
    assert "read" not in found and found["data"].after == ()
    assert [shlex.split(c)[-1] for c in found["unlearn-sets"].commands] == [
        f'unlearn.forget=["{d}"]' for d in ("hi", "de", "zh", "ar")
    ]
    # Norwegian's code is YAML's word for false
    small = "configs/quickstart/n16.yaml"
    norwegian = ('data.domains=["no",hi]', "data.repeat_domains=[hi]", "partition.n=2")
    of_all = named(small, *norwegian, 'unlearn.forget=["no",hi]')["unlearn-sets"].commands
    each = [load(small, (*norwegian, shlex.split(command)[-1])) for command in of_all]
    assert [config.unlearn.forget for config in each] == [("no",), ("hi",)]
    assert found["unlearn"].commands == ("unlearn_benchmarks.py configs/c4/n16.yaml",)
    assert found["train"].kind == "gpu" and found["data"].kind == "cpu"
    assert named(path, "device=cpu")["train"].kind == "cpu"


def test_what_partitions_start_from_is_trained_before_them():
    found = named("configs/cbtm/seed25.yaml")
    assert indices(found["train-first"]) == [0] and indices(found["train"]) == list(range(1, 16))
    assert found["train"].after == ("train-first",)
    demix = named("configs/shared_trunk/demix.yaml")
    assert demix["train"].commands == ("run_clm.py configs/shared_trunk/demix.yaml",)
    found = named(
        "configs/quickstart/n16.yaml",
        *("data.domains=[hi,de]", "data.added_domains=[en]", "partition.n=2"),
        *("training.added_from=nearest", "unlearn.forget=[]", "data.repeats={}"),
        "data.repeat_domains=[]",
    )
    assert indices(found["train-first"]) == [0, 1] and indices(found["train"]) == [2]
    assert "unlearn" not in found and found["report"].after == ("eval",)


def test_a_plan_is_refused_with_overwrite_and_is_written_a_command_a_line():
    with pytest.raises(UserError, match="overwrite: jobs of one plan"):
        named("configs/quickstart/n16.yaml", "overwrite=true")
    found = list(named("configs/quickstart/n04.yaml").values())
    rows = [line.split("\t") for line in lines(found).splitlines()]
    assert (
        [len(row) for row in rows] == [5] * len(rows) == [5] * sum(len(j.commands) for j in found)
    )
    assert rows[2] == [
        *("train", "cpu", "several", "router"),
        "run_clm.py configs/quickstart/n04.yaml partition.index=0",
    ]


# --- on this machine -------------------------------------------------------------------------


def begun(script: str, folder: Path, *arguments: str, **more: str) -> subprocess.Popen:
    """A script of scripts/, begun in `folder` with this interpreter's environment."""
    venv = folder / "venv"  # complete already: nothing is installed
    if not venv.exists():
        (venv / "bin").mkdir(parents=True)
        launcher = venv / "bin/python"
        launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        launcher.chmod(0o755)
        (venv / ".complete").touch()
    return subprocess.Popen(
        # as from a terminal, whatever began the tests (nohup has SIGHUP ignored)
        ["env", "--default-signal=HUP,INT", "bash", ROOT / "scripts" / script, *arguments],
        cwd=folder,
        env={**os.environ, "VENV": str(venv), "KEEP_ENVIRONMENT": "1", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_the_environment_is_made_anew_for_other_requirements_and_never_by_a_job(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/environment.sh", tmp_path / "scripts")
    stub = tmp_path / "python"
    stub.write_text(
        f'#!/bin/sh\necho "$2" >>{tmp_path}/calls\n'
        '[ "$2" != venv ] || { mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; }\n'
    )
    stub.chmod(0o755)
    requirements = tmp_path / "requirements.txt"

    def source(text: str, **more: str) -> tuple[int, str, int]:
        """Exit code, what it says, and how often something was made or installed so far."""
        requirements.write_text(text)
        done = subprocess.run(
            ["bash", "-c", f"source {tmp_path}/scripts/environment.sh"],
            env={"PATH": os.environ["PATH"], "PYTHON": str(stub), **more},
            capture_output=True,
            text=True,
        )
        calls = tmp_path / "calls"
        return done.returncode, done.stderr, len(calls.read_text().split()) if calls.exists() else 0

    job = {"KEEP_ENVIRONMENT": "1"}
    code, said, made = source("torch==1\n", **job)
    assert code == 1 and "bash scripts/setup_node.sh makes it" in said and not made
    assert source("torch==1\n")[2] == 2
    assert source("# why\ntorch==1\n") == (0, "", 2)  # newer, and the same
    code, said, made = source("torch==2\n", **job)
    assert code == 0 and "made of other requirements; it is used as it is" in said and made == 2
    code, said, made = source("torch==2\n")
    assert code == 0 and "making " in said and made == 4


def launched(
    script: str, folder: Path, *arguments: str, **more: str
) -> subprocess.CompletedProcess:
    """A script of scripts/, run to its end."""
    process = begun(script, folder, *arguments, **more)
    output, errors = process.communicate(timeout=600)
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def same_results(folder: Path, tiny: Path, forget: str) -> None:
    """The run n2 of a folder is, byte for byte, what the scripts made one after another."""
    runs = folder / "runs/n2", tiny / "runs/n2"
    for name in ("models/0", "models/1", "router", "eval", f"unlearn/{forget}/gold"):
        found, expected = (
            {k: v for k, v in tree_hashes(run / name).items() if "experts" not in k} for run in runs
        )
        assert found == expected and found, name
    assert read_json(runs[0] / "eval/utility.json") == read_json(runs[1] / "eval/utility.json")
    assert read_json(runs[0] / "metrics.json") == read_json(runs[1] / "metrics.json")
    assert (folder / "runs/n2/report/index.html").is_file()


def test_workers_of_this_machine_make_what_the_scripts_make(tiny, tmp_path):
    tiny_project(tmp_path)
    done = launched("run_local.sh", tmp_path, "--workers", "2", "configs/n2.yaml")
    assert done.returncode == 0, done.stderr
    same_results(tmp_path, tiny, "hi")
    assert "runs/n2/report/index.html" in done.stdout
    assert sorted(p.name for p in (tmp_path / "runs/n2/jobs").iterdir()) == [
        *("data-0.log", "eval-0.log", "report-0.log", "router-0.log"),
        *("train-0.log", "train-1.log", "unlearn-0.log"),
    ]


def test_a_task_that_fails_ends_the_run_with_its_last_lines(tiny, tmp_path):
    shutil.copytree(tiny / "configs", tmp_path / "configs")
    shutil.copytree(tiny / "processed", tmp_path / "processed")
    shutil.copytree(tiny / "raw", tmp_path / "raw")
    more = ("--workers", "1", "configs/n2.yaml", "training.learning_rate=1e30")
    done = launched("run_local.sh", tmp_path, *more)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "tiered.local_run: error: train 0: exit code 2; the end of runs/n2/jobs/train-0.log" in (
        done.stderr
    )
    assert "the training loss is nan at step" in done.stderr
    assert not (tmp_path / "runs/n2/jobs/eval-0.log").exists()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_a_run_that_is_asked_to_end_ends_its_trainings_and_goes_on(number, tiny, tmp_path):
    """Ctrl-C at a run, or a sweep alone is told that its terminal is closed: the trainings save,
    nothing is left running."""
    for name in ("configs", "processed", "raw", "runs/n2/router", "runs/n2/partition"):
        shutil.copytree(tiny / name, tmp_path / name)
    shutil.copytree(tiny / "runs/.store", tmp_path / "runs/.store")
    alone = number == signal.SIGHUP
    script, option = ("sweep.sh", ("--local",)) if alone else ("run_local.sh", ("--workers", "1"))
    process = begun(script, tmp_path, *option, "configs/n2.yaml", "training.num_train_epochs=300")
    deadline = time.monotonic() + 200
    checkpoints = tmp_path / "runs/.store/models/.checkpoints"
    while not list(checkpoints.glob("*/*/hashes.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    for _ in range(2):  # an impatient one
        os.kill(process.pid, number) if alone else os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + (signal.SIGTERM if alone else number), errors
    assert re.search(r"asked to end: train .*; the same command goes on from there", errors)
    assert "Traceback" not in errors
    # two may have been at it: the one that had a checkpoint trained
    said = "".join(log.read_text() for log in tmp_path.glob("runs/n2/jobs/train-*.log"))
    assert re.search(r"asked to end; state saved at step \d+", said), said
    assert not list(tmp_path.rglob("*.lock"))


def test_a_signal_that_nohup_has_ignored_stays_so():
    before = {number: signal.getsignal(number) for number in local_run.SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        local_run.listen()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


FAILS = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); "
SAVES = FAILS.replace("sys.exit(3)", "(time.sleep(33), os.write(1, b'saved\\n'), sys.exit(143))")


@pytest.mark.parametrize(
    ("task", "first", "requeued", "said"),
    [
        ({}, "", "requeue 7\n", "exit code 143"),
        ({"SLURM_ARRAY_JOB_ID": "7"}, "", "requeue 7_2\n", "exit code 143"),
        ({"SLURM_RESTART_COUNT": "30"}, "", "", "begun again 30 times and not done"),
        ({}, FAILS, "", "exit code 1"),
        pytest.param(
            {"SITE_GPUS": "2"}, SAVES, "requeue 7\n", "saved\nsaved\n", marks=pytest.mark.slow
        ),
    ],
    ids=["job", "array", "too often", "failed", "torchrun"],
)
def test_a_task_that_is_asked_to_end_requeues_itself_alone(task, first, requeued, said, tmp_path):
    """The last task of an array has the array's number: all of it would be queued again. Not one
    that fails, or has been begun again too often. Under torchrun the processes have SITE_GRACE to
    save, which is more than its own 30 s."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (stubs / "scontrol").chmod(0o755)
    code = f"import os, time; {first}os.write(1, b'at work\\n'); time.sleep(60)"
    command = shlex.join(["-m", "timeit", "-n1", "-r1", code])
    (tmp_path / "plan.tsv").write_text(f"train\tcpu\tseveral\t\t{command}\n" * 3)
    site = SITE.replace("SITE_GPUS=1", f"SITE_GPUS={task.get('SITE_GPUS', 1)}")
    site = site.replace("SITE_GRACE=30", "SITE_GRACE=60")
    (tmp_path / "site.sh").write_text(site.replace("{ :; }", '{ : "$NOT_SET_ANYWHERE"; }'))
    settings = {"SITE": str(tmp_path / "site.sh"), "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    settings |= {"PATH": f"{stubs}:{os.environ['PATH']}", **task}
    arguments = (str(ROOT), str(tmp_path / "plan.tsv"), "train")
    process = begun("job.sbatch", tmp_path, *arguments, **settings)
    left = int(task.get("SITE_GPUS", 1))
    while left:
        left -= process.stdout.readline() == "at work\n"
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=90)
    assert process.returncode == (1 if first else 143) and said in output + errors, errors
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == requeued


def test_submissions_of_a_run_have_plans_of_their_own(tmp_path, monkeypatch, capsys):
    """Tasks of the first read theirs when they begin, perhaps after the second was submitted. What
    the GPUs of a training cannot share is refused before anything is queued."""
    monkeypatch.chdir(tmp_path)
    config, write = str(ROOT / "configs/quickstart/n01.yaml"), "--write"
    names = []
    for more in ([], ["training.learning_rate=1e-4"], []):
        monkeypatch.setattr(sys, "argv", ["plan", config, *more, write])
        plan.main()
        names.append(capsys.readouterr().out)
    assert names[0] == names[2] != names[1]
    first, second = (Path(name.strip()).read_text() for name in names[:2])
    assert first != second and "1e-4" not in first and "1e-4" in second
    monkeypatch.setattr(sys, "argv", ["plan", config, "--gpus", "2", write])
    with pytest.raises(SystemExit):
        plan.main()
    assert "1 micro-batches per optimizer step cannot be shared by 2" in capsys.readouterr().err


def test_numbers_below_0_and_line_breaks_are_refused(tmp_path):
    for arguments in (["--workers", "-1"], ["--reading-tasks", "-1"], ["name=a\tb"]):
        with pytest.raises(UserError, match=r"below 0|line break or tab"):
            parse(["configs/quickstart/n01.yaml", *arguments], "tiered.local_run", "")


def test_no_key_is_left_in_what_slurm_is_given(tmp_path):
    """Whatever way secrets.env sets it, and by its name where it is in no file."""
    (tmp_path / "secrets.env").write_text(
        " A_K=1\nexport B_K=2 C_K=3\ndeclare -x D_K=4\nE_K=5; F_K=6\n"
    )
    code = f"set -eu; ROOT={tmp_path}; source {ROOT}/scripts/hide_secrets.sh; env"
    keys = dict.fromkeys(
        ["A_K", "B_K", "C_K", "D_K", "E_K", "F_K", "COMET_API_KEY", "HF_TOKEN"], "x"
    )
    given = {**os.environ, **keys, "KEPT": "x"}
    found = subprocess.run(
        ["bash", "-c", code], env=given, capture_output=True, text=True, check=True
    )
    names = {line.partition("=")[0] for line in found.stdout.splitlines()}
    assert not names & keys.keys() and {"KEPT", "PATH"} <= names


def test_dry_runs_print_the_plan_and_touch_nothing(tiny, tmp_path):
    shutil.copytree(tiny / "configs", tmp_path / "configs")
    (tmp_path / "site.sh").write_text(SITE)
    site = {"SITE": str(tmp_path / "site.sh")}
    done = launched("run_local.sh", tmp_path, "--dry-run", "configs/n2.yaml")
    assert "train (2 tasks, cpu) after router" in done.stdout, done.stderr
    done = launched("sweep.sh", tmp_path, "--dry-run", "configs/n1.yaml", "configs/n2.yaml", **site)
    assert done.returncode == 0, done.stderr
    (first, second) = (
        line for line in done.stderr.splitlines() if line.startswith("sbatch") and "-read" in line
    )
    assert "--dependency" not in first and "--dependency=afterany:<router>" in second
    assert "--array=0-1%2" in first and "--kill-on-invalid-dep" in done.stderr
    assert "then: " in done.stdout and "runs/n1 runs/n2" in done.stdout
    assert not (tmp_path / "runs").exists()


# --- Slurm -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A Slurm of two nodes on this machine; the environment its commands need."""
    lacking = [c for c in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(c)]
    if lacking:
        pytest.skip(f"no {', '.join(lacking)} here (apt-get install slurm-wlm munge)")
    if os.geteuid():
        pytest.skip("slurmctld and slurmd of the test cluster run as root")
    folder = tmp_path_factory.mktemp("slurm")
    script = ROOT / "tests/slurm_cluster.sh"
    done = subprocess.run(
        ["bash", script, "start", folder], capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        subprocess.run(["bash", script, "stop", folder], check=False, timeout=60)
        pytest.skip(f"Slurm does not start on this machine: {done.stderr[-1000:]}")
    yield {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run(["bash", script, "stop", folder], check=True, timeout=60)


def wait_for_queue(slurm: dict[str, str], folder: Path, seconds: float) -> None:
    """Until no job is left; fails with the logs of the run after `seconds`."""
    deadline = time.monotonic() + seconds
    while subprocess.run(
        ["squeue", "-h"], env={**os.environ, **slurm}, capture_output=True, text=True, check=True
    ).stdout.strip():
        if time.monotonic() > deadline:
            logs = "".join(p.read_text()[-2000:] for p in folder.glob("runs/*/jobs/*.log"))
            pytest.fail(f"jobs are left after {seconds:.0f} s\n{logs}")
        time.sleep(1)


def test_jobs_of_slurm_make_what_the_scripts_make(slurm, tiny, tmp_path):
    tiny_project(tmp_path)
    (tmp_path / "site.sh").write_text(SITE)
    secret = {"WANDB_API_KEY": "a-key-that-nobody-may-read"}
    site = {"SITE": str(tmp_path / "site.sh"), **slurm, **secret}
    done = launched("slurm.sh", tmp_path, "configs/n2.yaml", **site)
    assert done.returncode == 0, done.stderr
    wait_for_queue(slurm, tmp_path, 400)
    same_results(tmp_path, tiny, "hi")
    logs = {p.name: p.read_text() for p in (tmp_path / "runs/n2/jobs").glob("*.log")}
    assert {"read-0.log", "read-1.log", "tokenise-3.log", "train-1.log"} <= logs.keys()
    assert all(text.rstrip().endswith("exit code 0") for text in logs.values())
    for path in [*tmp_path.rglob("*"), *Path(slurm["SLURM_CONF"]).parent.rglob("*")]:
        if path.is_file() and path.name != "test_launching.py":
            assert secret["WANDB_API_KEY"].encode() not in path.read_bytes(), path


def asked_to_end(how: str, task: str, slurm: dict[str, str]) -> None:
    """Slurm asks a task that trains to end."""
    asks = {
        "signal": ("scancel", "--signal=USR1", "--batch", task),
        "time limit": ("true",),
        "preempted": ("sbatch", "--partition=urgent", "--nodes=2", "--wrap=sleep 1"),
    }
    ask = asks[how.removesuffix(" with notice")]
    subprocess.run(ask, env={**os.environ, **slurm}, check=True, cwd="/")


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """The model of n1 with some overrides: hashes of its files, trained in one go."""

    @functools.cache
    def trained(gpus: int, *overrides: str) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("undisturbed")
        for name in ("configs", "processed", "raw"):
            shutil.copytree(tiny / name, folder / name)
        run_stages(folder, ("train_det_router",), "configs/n1.yaml", *overrides)
        if gpus == 1:
            run_stages(folder, ("run_clm",), "configs/n1.yaml", *overrides)
        else:
            launch = (sys.executable, "-m", "torch.distributed.run", "--standalone")
            script = (f"--nproc_per_node={gpus}", str(ROOT / "run_clm.py"), "configs/n1.yaml")
            subprocess.run((*launch, *script, *overrides), cwd=folder, check=True, timeout=900)
        return tree_hashes(folder / "runs/n1/models/0")

    return trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "options", "gpus"),
    [
        ("signal", "", 1),
        ("time limit", "--time=3", 2),
        ("preempted", "", 1),
        ("preempted with notice", "--partition=noticed", 1),
    ],
)
def test_a_task_that_slurm_asks_to_end_saves_and_is_queued_again(
    how, options, gpus, slurm, undisturbed, tiny, tmp_path
):
    """Each time it goes on where it was; its model is, byte for byte, the undisturbed one. Slurm
    begins a requeued job two minutes later. The time limit (in minutes; Slurm asks up to a minute
    before SITE_GRACE) is met by two processes of torchrun."""
    for name in ("configs", "processed", "raw"):
        shutil.copytree(tiny / name, tmp_path / name)
    site = f"{SITE}SITE_CPU=(--cpus-per-task=1 {options}) SITE_GPUS={gpus} SITE_GRACE=60\n"
    (tmp_path / "site.sh").write_text(site)
    more = (f"training.num_train_epochs={5 if gpus == 1 else 20}", "unlearn.forget=[]")
    more += ("training.save_steps=100000", "training.dataloader_num_workers=1")
    more += ("training.gradient_accumulation_steps=2", "training.per_device_train_batch_size=4")
    done = launched(
        "slurm.sh", tmp_path, "configs/n1.yaml", *more, SITE=str(tmp_path / "site.sh"), **slurm
    )
    assert done.returncode == 0, done.stderr
    task = dict(line.split() for line in done.stdout.splitlines())["train"]
    log, deadline = tmp_path / "runs/n1/jobs/train-0.log", time.monotonic() + 600
    locks = tmp_path / "runs/.store/models/.locks"
    while not list(locks.glob("*.lock")):  # it trains
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.2)
    time.sleep(3)
    asked_to_end(how, task, slurm)
    wait_for_queue(slurm, tmp_path, 1200)
    text = log.read_text()
    saved = re.findall(r"asked to end; state saved at step (\d+)", text)
    assert saved and re.findall(r"resuming from step (\d+)", text) == saved, text
    assert len(saved) == 1 or how == "time limit", text
    assert saved == sorted(set(saved), key=int)  # said once, further each time
    assert text.rstrip().endswith("exit code 0")
    assert tree_hashes(tmp_path / "runs/n1/models/0") == undisturbed(gpus, *more)

"""Tests of runs that launchers start: torchrun, accelerate, Slurm."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from conftest import ROOT

from fixefficientnet._internal import processes
from fixefficientnet.errors import FixEfficientNetError

pytestmark = pytest.mark.newest

SMALL = ["--train-size", "32", "--test-size", "48", "--batch-size", "4", "-j", "0", "--val-interval", "0"]
FAKE_SRUN = """#!/bin/bash
# Two tasks on this machine; notes what it was asked for, and ends with the highest status.
echo "$@" > srun.txt
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & one=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & two=$!
trap 'kill -TERM $one $two' TERM
status=0
for task in $one $two; do
    while kill -0 $task 2> /dev/null; do wait $task || found=$?; done
    (( ${found:-0} > status )) && status=$found
done
exit $status
"""
FAKE_SCONTROL = """#!/bin/sh
echo "$@" >> scontrol.txt
echo 127.0.0.1
"""


def environment(**more: str) -> dict[str, str]:
    binaries = Path(sys.executable).parent
    return (
        os.environ
        | {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        | more
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a job of Slurm runs on Linux")
def test_the_slurm_job_runs_on_two_nodes(hub_cache: Path, tmp_path: Path):
    images = tiny.make_data(tmp_path / "data", ("n01440764", "n02124075", "n07920052"), train=4, val=2)
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
    }
    env = environment(**slurm, SLURM_CPUS_PER_TASK="7", HF_HUB_CACHE=str(hub_cache))
    env["PATH"] = f"{tmp_path / 'bin'}:{env['PATH']}"
    job = ["bash", str(ROOT / "examples" / "reproduce.slurm"), "b0", "--data", str(images), "--method", "cached"]
    job += [*SMALL, "--epochs", "1", "--device", "cpu"]
    done = subprocess.run(job, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes on cpu" in done.stdout
    assert "--cpus-per-task=7" in (tmp_path / "srun.txt").read_text()
    assert json.loads((tmp_path / "runs" / "b0" / "report.json").read_text())["processes"] == 2
    assert "requeue" not in (tmp_path / "scontrol.txt").read_text()

    job += ["--experiment", "stopped", "--epochs", "500000"]
    with subprocess.Popen(job, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        log = tmp_path / "runs" / "stopped" / "log.jsonl"
        until = time.monotonic() + 240
        while process.poll() is None and not log.exists() and time.monotonic() < until:
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)  # to the step, as Slurm does
        said = process.communicate(timeout=240)[0]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert f"requeue {os.getpid()}" in (tmp_path / "scontrol.txt").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_torchrun_starts_a_killed_process_again_and_the_bytes_are_the_same(tmp_path: Path):
    images = tiny.make_data(tmp_path / "data")
    place = ["--data", str(images), "--output", str(tmp_path)]
    base = [*tiny.NETWORK, "--stage", "base", "--no-pretrained", "--experiment", "base"]
    tiny.run([*base, *place, *SMALL[:-2], "--epochs", "1"], tmp_path / "said.txt")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["--max-restarts", "2", "-m", "fixefficientnet.reproduce", *tiny.NETWORK, *place, *SMALL]
    command += [
        "--checkpoint",
        str(tmp_path / "base"),
        "--method",
        "online",
        "--epochs",
        "12",
        "--checkpoint-steps",
        "1",
    ]
    for name in ("whole", "killed"):
        with subprocess.Popen(
            [*command, "--experiment", name],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            if name == "killed":
                state = tmp_path / name / "checkpoint" / "state.safetensors"
                until = time.monotonic() + 240
                while process.poll() is None and not state.exists() and time.monotonic() < until:
                    time.sleep(0.01)
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                os.kill(int(children[-1]), signal.SIGKILL)
            said = process.communicate(timeout=400)[0]
        assert process.returncode == 0, said
    assert "Continuing after step" in said
    deltas = [(tmp_path / name / "delta.safetensors").read_bytes() for name in ("whole", "killed")]
    assert deltas[0] == deltas[1]


def test_processes_that_are_restarted_on_several_nodes_say_what_torchrun_needs(monkeypatch: pytest.MonkeyPatch):
    restarted = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (restarted | {"WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FixEfficientNetError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        processes.accelerator("cpu", "no")

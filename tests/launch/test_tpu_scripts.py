"""The scripts of launch/tpu: what they would run, how they end on wrong arguments, and the restart loop, really run."""
import contextlib
import json
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
import yaml

TPU = Path(__file__).parents[2] / "launch" / "tpu"
SCRIPTS = sorted(TPU.glob("*.sh"))
MACHINE = "--name vino-a --project proj --zone us-east5-a".split()
RUN = "--topology v5p:4x4x4 --bucket runs --workdir /mnt/runs/a".split()
CODE = ["--code", "https://example.org/vino.git@0123abcd"]
TRAINING = ["--config", "configs/media.py", "--config.mesh.fsdp=8", "--config.sampling.size=(1, 'a\"b')"]
COMMAND = ["-m", "launch.train", "--workdir", "/mnt/runs/a", *TRAINING]
CREATE = ["create", *MACHINE, *RUN, *CODE]
XPK = ["xpk", *MACHINE, *RUN, "--cluster", "c"]
JOBSET = ["jobset", "--name", "vino-a", *RUN, "--image", "reg/vino:1"]


def run(script, *arguments, **options):
    return subprocess.run(["bash", str(TPU / script), *arguments], capture_output=True, text=True, timeout=20, check=False, **options)


@pytest.fixture
def bare(tmp_path):
    """Environment whose PATH has a few tools of the shell, and no gcloud, kubectl, xpk, apt-get, pip or Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "sed", "dirname", "cat", "mktemp", "rm", "cp", "tee", "sleep"):
        (folder / tool).symlink_to(shutil.which(tool))
    return {"PATH": str(folder)}


@pytest.fixture
def dry(bare):
    """dry(arguments) -> the lines that `pod.sh --dry-run` prints, on a machine where nothing could be run."""
    def call(arguments, training=()):
        done = run("pod.sh", *arguments, "--dry-run", *(["--", *training] if training else []), env=bare)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return call


def startup_script(lines):
    assert lines[0] == "--- startup_script.sh" and lines[-2] == "---"
    return "\n".join(lines[1:-2]) + "\n"


def executable(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!{shutil.which('bash')}\n{text}")
    file.chmod(0o755)


def test_shellcheck_finds_nothing(dry, tmp_path):
    written = []
    for name, code in (("git", CODE), ("tar", ["--code", "gs://runs/vino.tar.gz"])):
        file = tmp_path / f"{name}.sh"
        file.write_text(startup_script(dry(["create", *MACHINE, *RUN, *code], TRAINING)))
        written.append(file)
    assert len(SCRIPTS) == 3
    done = subprocess.run([str(Path(sys.executable).parent / "shellcheck"), *SCRIPTS, *written], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_strict_executable_and_tell_their_usage(script):
    assert os.access(script, os.X_OK) and "\nset -euo pipefail\n" in script.read_text()
    told = run(script.name, "--help")
    assert told.returncode == 0 and script.name in told.stdout and "--dry-run" in told.stdout


# the topology of the ahead-of-time compiler -> Google's accelerator type, runtime, GKE's label, hosts
@pytest.mark.parametrize("topology, kind, runtime, label, hosts", [
    ("v4:2x2x4", "v4-32", "tpu-ubuntu2204-base", "tpu-v4-podslice", 4),
    ("v5p:4x4x4", "v5p-128", "v2-alpha-tpuv5", "tpu-v5p-slice", 16),
    ("v5p:8x8x8", "v5p-1024", "v2-alpha-tpuv5", "tpu-v5p-slice", 128),
    ("v5e:16x16", "v5litepod-256", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 64),
    ("v6e:8x8", "v6e-64", "v2-alpha-tpuv6e", "tpu-v6e-slice", 16),
    ("v6e:16x16", "v6e-256", "v2-alpha-tpuv6e", "tpu-v6e-slice", 64),
    ("tpu7x:4x4x4", "tpu7x-128", None, "tpu7x", 16),
])
def test_topologies(dry, topology, kind, runtime, label, hosts):
    at = ["--topology", topology]  # the last of two holds
    if runtime:
        command = dry([*CREATE, *at], TRAINING)[-1]
        assert f" --accelerator-type {kind} --runtime-version {runtime} " in command
    assert f" --tpu-type {kind} " in dry([*XPK, *at], TRAINING)[-1]
    slice_ = manifest(dry([*JOBSET, *at], TRAINING))["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert slice_["parallelism"] == slice_["completions"] == hosts
    assert slice_["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": topology.split(":")[1]}


def test_create(dry):
    lines = dry(CREATE, TRAINING)
    assert lines[-1] == (
        "gcloud compute tpus queued-resources create vino-a --project proj --zone us-east5-a --accelerator-type v5p-128 "
        "--runtime-version v2-alpha-tpuv5 --node-id vino-a --metadata-from-file startup-script=startup_script.sh")
    script = startup_script(lines)
    assert script.startswith("#!/bin/bash\n")
    assert "\n[[ -d .git ]] || git clone --quiet https://example.org/vino.git .\ngit checkout --quiet --force 0123abcd\n" in script
    assert "\nbash launch/tpu/setup_host.sh --bucket runs\n" in script
    service = shlex.split(script[script.index("systemd-run"):])
    assert {"--unit=vino-train", "--property=KillMode=mixed", "--property=TimeoutStopSec=600", "--property=StandardOutput=journal+console",
            "--setenv=VINO_DISTRIBUTED=1", "--setenv=JAX_COMPILATION_CACHE_DIR=/mnt/runs/a/compile_cache"} <= set(service)
    assert "LIBTPU_INIT_ARGS" not in script
    assert service[service.index("bash"):] == ["bash", "launch/tpu/train_loop.sh", "--restarts", "100", "--log", "/var/log/vino_train.log", "--",
                                               ".venv/bin/python", *COMMAND]


def test_create_on_spot_slices_with_flags(dry):
    lines = dry([*CREATE, "--spot", "--slices=2", "--flags", "latency", "--grace", "900", "--bucket", "media"], [*TRAINING, "--config.a=b$"])
    assert " --node-count 2 --node-prefix vino-a --spot " in lines[-1] and "--node-id" not in lines[-1]
    script = startup_script(lines)
    assert "setup_host.sh --bucket runs --bucket media\n" in script and "--property=TimeoutStopSec=900" in script
    service = shlex.split(script[script.index("systemd-run"):])
    flags = next(one for one in service if one.startswith("--setenv=LIBTPU_INIT_ARGS="))
    assert "--xla_tpu_enable_async_collective_fusion=true" in flags and "  " not in flags
    assert service[-1] == "--config.a=b$$"  # systemd reads $$ as $


def test_code_from_a_bucket(dry):
    script = startup_script(dry([*CREATE, "--code", "gs://runs/code/vino.tar.gz"], TRAINING))
    assert "\ngcloud storage cat gs://runs/code/vino.tar.gz | tar xz\n" in script and "git" not in script


def test_xpk(dry):
    words = shlex.split(dry([*XPK, "--slices", "2", "--image", "reg/vino:1"], TRAINING)[-1])
    assert words[:4] == ["xpk", "workload", "create", "--workload"]
    pairs = list(zip(words, words[1:]))
    for pair in [("--cluster", "c"), ("--num-slices", "2"), ("--docker-image", "reg/vino:1"), ("--docker-name", "train"),
                 ("--restart-on-exit-codes", "42,43,44,134,143"), ("--termination-grace-period-seconds", "600"), ("--max-restarts", "100"),
                 ("--env", "VINO_DISTRIBUTED=1"), ("--storage", "runs")]:
        assert pair in pairs
    start = shlex.split(words[-1])  # what the shell in the container makes of it
    assert start == ["exec", "bash", "launch/tpu/train_loop.sh", "--restarts", "0", "--", "python", *COMMAND]


def test_xpk_without_an_image_copies_this_repository(dry):
    words = shlex.split(dry(XPK, TRAINING)[-1])
    assert words[words.index("--script-dir") + 1] == str(TPU.parents[1]) and "--docker-image" not in words
    assert words[-1].startswith("bash launch/tpu/setup_host.sh && exec bash launch/tpu/train_loop.sh --restarts 0 -- .venv/bin/python -m launch")


def manifest(lines):
    assert lines[0] == "--- jobset.yaml" and lines[-2:] == ["---", "kubectl apply --filename jobset.yaml"]
    return yaml.safe_load("\n".join(lines[1:-2]))


def test_jobset(dry):
    lines = dry(JOBSET, TRAINING)
    assert "@" not in "".join(lines)
    whole = manifest(lines)
    assert (whole["apiVersion"], whole["kind"], whole["metadata"]["name"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet", "vino-a")
    assert whole["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": "vino-a"}
    assert whole["spec"]["failurePolicy"]["maxRestarts"] == 100
    rule, = whole["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    one, = whole["spec"]["replicatedJobs"]
    job, pod = one["template"]["spec"], one["template"]["spec"]["template"]
    assert one["replicas"] == 1 and job["backoffLimit"] == 0
    evicted, ended = job["podFailurePolicy"]["rules"]
    assert evicted == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert ended == {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "NotIn", "values": [42, 43, 44, 134, 143]}}
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    spec = pod["spec"]
    assert spec["restartPolicy"] == "Never" and spec["terminationGracePeriodSeconds"] == 600 and spec["hostNetwork"] is False
    container, = spec["containers"]
    assert container["name"] == "train" and container["image"] == "reg/vino:1"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["command"] == ["bash", "launch/tpu/train_loop.sh", "--restarts", "0", "--", "python", *COMMAND]
    assert {"name": "VINO_DISTRIBUTED", "value": "1"} in container["env"]
    assert all(isinstance(entry["value"], str) for entry in container["env"])
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/dev/shm", "/mnt/runs"]
    assert [volume["name"] for volume in spec["volumes"]] == [mount["name"] for mount in container["volumeMounts"]]
    assert spec["volumes"][1]["csi"]["volumeAttributes"]["bucketName"] == "runs"


def test_jobset_on_spot_slices_with_flags_and_odd_characters(dry):
    odd = r'--config.x="a"\b & (c|d)$ @e'
    whole = manifest(dry([*JOBSET, "--spot", "--slices", "3", "--flags", "latency", "--grace", "900", "--bucket", "media"], [odd]))
    one, = whole["spec"]["replicatedJobs"]
    spec = one["template"]["spec"]["template"]["spec"]
    assert one["replicas"] == 3 and spec["hostNetwork"] is True and spec["terminationGracePeriodSeconds"] == 900
    assert spec["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    container, = spec["containers"]
    assert container["command"][-1] == odd
    assert any(entry["name"] == "LIBTPU_INIT_ARGS" for entry in container["env"])
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/dev/shm", "/mnt/runs", "/mnt/media"]
    assert spec["volumes"][2]["csi"]["volumeAttributes"] == {
        "bucketName": "media", "mountOptions": "implicit-dirs", "hostNetworkPodKSA": "true"}


@pytest.mark.parametrize("arguments, commands", [
    ("status", ["gcloud compute tpus queued-resources describe vino-a --format yaml(state, tpu.nodeSpec) {at}"]),
    ("delete", ["gcloud compute tpus queued-resources delete vino-a --force --quiet {at}"]),
    ("stop", ["gcloud compute tpus tpu-vm ssh vino-a --worker all --command sudo systemctl stop vino-train {at}"]),
    ("stop --slices 2", ["gcloud compute tpus tpu-vm ssh vino-a-0 --worker all --command sudo systemctl stop vino-train {at}",
                         "gcloud compute tpus tpu-vm ssh vino-a-1 --worker all --command sudo systemctl stop vino-train {at}"]),
    ("logs --slices 2 --follow", ["gcloud compute tpus tpu-vm ssh vino-a-0 --worker 0 --command "
                                  "sudo tail --lines 100 --follow=name /var/log/vino_train.log {at}"]),
    ("logs --slices 2 --worker all", [f"gcloud compute tpus tpu-vm ssh vino-a-{i} --worker all --command "
                                      "sudo tail --lines 100 /var/log/vino_train.log {at}" for i in (0, 1)]),
])
def test_what_is_asked_of_a_queued_resource(dry, arguments, commands):
    name, *rest = arguments.split()
    at = "--project proj --zone us-east5-a"
    assert [" ".join(shlex.split(line)) for line in dry([name, *MACHINE, *rest])] == [command.format(at=at) for command in commands]


def test_profile(dry):
    command, = dry(["profile", *MACHINE, "--workdir", "/mnt/runs/a", "--seconds", "3"])
    words = shlex.split(command)
    there = shlex.split(words[words.index("--command") + 1])
    assert there[:3] == ["sudo", "bash", "-c"] and len(there) == 4
    assert "python -m jax.collect_profile 9012 3000 --log_dir /mnt/runs/a/profile --no_perfetto_link" in there[3]


@pytest.mark.parametrize("script, arguments, words", [
    ("pod.sh", [], "'' is no command of pod.sh; it must be one of create,"),
    ("pod.sh", ["creat"], "'creat' is no command of pod.sh"),
    ("pod.sh", ["create", *MACHINE, *RUN], "'pod.sh create' needs --code"),
    ("pod.sh", [*CREATE, "--image", "i"], "'pod.sh create' takes no '--image'"),
    ("pod.sh", [*CREATE, "configs/media.py"], "'pod.sh create' takes no 'configs/media.py'"),
    ("pod.sh", [*CREATE, "--spot=yes"], "--spot takes no value"),
    ("pod.sh", [*CREATE, "--slices"], "--slices needs a value"),
    ("pod.sh", [*CREATE, "--slices", "two"], "--slices must be like 2, not 'two'"),
    ("pod.sh", [*CREATE, "--slices", "0"], "--slices must be like 2, not '0'"),
    ("pod.sh", [*CREATE, "--grace", "10m"], "--grace must be like 600, not '10m'"),
    ("pod.sh", [*CREATE, "--name", "Vino_A"], "--name must be like vino-a, not 'Vino_A'"),
    ("pod.sh", [*CREATE, "--bucket", "gs://runs"], "--bucket must be like my-bucket, not 'gs://runs'"),
    ("pod.sh", [*CREATE, "--workdir", "gs://runs/a"], "--workdir must be like /mnt/BUCKET/runs/a, not 'gs://runs/a'"),
    ("pod.sh", [*CREATE, "--workdir", "/mnt/run/a", "--", "--config", "c"], "--workdir /mnt/run/a lies in none of the buckets"),
    ("pod.sh", [*CREATE, "--code", "https://example.org/vino.git"], "--code must be like https://HOST/REPOSITORY@COMMIT"),
    ("pod.sh", [*CREATE, "--code", "https://example.org/vino.git@main"], "--code must be like https://HOST/REPOSITORY@COMMIT"),
    ("pod.sh", [*CREATE, "--flags", "fast", "--", "--config", "c"], "--flags must be one of "),
    ("pod.sh", [*CREATE, "--topology", "v5p", "--", "--config", "c"], "--topology must be like v5p:4x4x4, not 'v5p'"),
    ("pod.sh", [*CREATE, "--topology", "v9:4x4", "--", "--config", "c"], "unknown chip 'v9' in --topology v9:4x4"),
    ("pod.sh", [*CREATE, "--topology", "v5p:8x8", "--", "--config", "c"], "--topology v5p:8x8: a shape of v5p has 3 sizes"),
    ("pod.sh", [*CREATE, "--topology", "v6e:1x1", "--", "--config", "c"], "--topology v6e:1x1: 1 chips are not whole hosts of 4"),
    ("pod.sh", [*CREATE, "--topology", "tpu7x:4x4x4", "--", "--config", "c"], "tpu7x is on GKE alone; use pod.sh xpk or pod.sh jobset"),
    ("pod.sh", CREATE, "no arguments of launch.train after --"),
    ("pod.sh", JOBSET, "no arguments of launch.train after --"),
    ("pod.sh", ["profile", *MACHINE], "'pod.sh profile' needs --workdir"),
    ("pod.sh", ["logs", *MACHINE, "--worker", "first"], "--worker must be like 0 or all, not 'first'"),
    ("setup_host.sh", ["--bucket", "gs://runs"], "--bucket takes a bucket's name without gs://, not 'gs://runs'"),
    ("setup_host.sh", ["--bucket"], "--bucket takes a bucket's name without gs://, not ''"),
    ("setup_host.sh", ["--buckets"], "unknown argument '--buckets' of setup_host.sh"),
    ("train_loop.sh", [], "no command after --"),
    ("train_loop.sh", ["--pause", "x", "--", "true"], "--pause takes a number, not 'x'"),
    ("train_loop.sh", ["--log"], "--log needs a value"),
    ("train_loop.sh", ["true"], "unknown argument 'true' of train_loop.sh"),
])
def test_wrong_arguments_are_one_line(bare, script, arguments, words):
    done = run(script, *arguments, env=bare)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1, done.stderr


def test_create_hands_the_script_to_gcloud_and_its_failure_to_the_caller(bare, tmp_path):
    script = f'echo "$*" > {tmp_path}/said; file=${{!#}}; cp "${{file#startup-script=}}" {tmp_path}/copy; exit 3\n'
    executable(Path(bare["PATH"]) / "gcloud", script)
    (tmp_path / "temporary").mkdir()
    done = run("pod.sh", *CREATE, "--", *TRAINING, env={**bare, "TMPDIR": str(tmp_path / "temporary")})
    assert done.returncode == 3 and "queued-resources create vino-a" in (tmp_path / "said").read_text()
    dry = run("pod.sh", *CREATE, "--dry-run", "--", *TRAINING, env=bare).stdout.splitlines()
    assert (tmp_path / "copy").read_text() == startup_script(dry)
    assert not list((tmp_path / "temporary").iterdir())


def test_set_up_of_a_bare_host(bare, tmp_path):
    copy = tmp_path / "code" / "launch" / "tpu"
    copy.mkdir(parents=True)
    shutil.copy(TPU / "setup_host.sh", copy)
    (tmp_path / "code" / "setup.py").touch()
    call = lambda: subprocess.run(["bash", copy / "setup_host.sh", "--bucket", "runs", "--dry-run"], env=bare, capture_output=True, text=True,  # noqa: E731
                                  check=True, timeout=20).stdout
    told = call()
    steps = ["install python3.11 python3.11-venv", "python3.11 -m venv .venv", " --editable .\\[tpu\\]", "touch .venv/.installed-tpu",
             "install gcsfuse", "mkdir -p /mnt/runs", "gcsfuse --implicit-dirs -o allow_other runs /mnt/runs"]
    places = [told.index(step) for step in steps]
    assert places == sorted(places)
    # what is there stays
    for tool in ("python3.11", "gcsfuse", "mountpoint"):
        executable(Path(bare["PATH"]) / tool, "exit 0\n")
    marker = tmp_path / "code" / ".venv" / ".installed-tpu"
    marker.parent.mkdir()
    marker.touch()
    os.utime(tmp_path / "code" / "setup.py", (0, 0))
    assert call() == ""


# A python that ends with the next code of the file `codes`, and notes how it was called.
PYTHON = 'read -r code < codes; sed -i 1d codes; echo "$VINO_DISTRIBUTED $*" >> calls; echo "training, then $code"; exit "$code"\n'


def loop(folder, codes, *flags):
    executable(folder / "python", PYTHON)
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    done = run("train_loop.sh", "--pause", "0", *flags, "--", "./python", "-m", "launch.train", cwd=folder)
    return done, len((folder / "calls").read_text().splitlines())


@pytest.mark.parametrize("codes, flags, code, starts", [
    ((42, 43, 0), (), 0, 3),
    ((134, 143, 0), (), 0, 3),  # another host is gone; stopped before there was anything to save
    ((2, 0), (), 2, 1),
    ((134, 44, 0), (), 44, 2),  # the other host has ended for good
    ((42, 2, 0), (), 2, 2),
    ((1, 0), (), 1, 1),
    ((137, 0), (), 137, 1),
    ((42, 42, 42, 0), ("--restarts", "2"), 42, 3),
    ((42, 0), ("--restarts", "0"), 42, 1),
])
def test_restarts(tmp_path, codes, flags, code, starts):
    done, count = loop(tmp_path, codes, *flags)
    assert (done.returncode, count) == (code, starts), done.stdout + done.stderr


def test_the_log_has_everything_and_says_why(tmp_path):
    done, _ = loop(tmp_path, (42, 43, 0), "--log", "log")
    assert (tmp_path / "log").read_text() == done.stdout == (
        "training, then 42\ntrain_loop: exit code 42 (asked to stop, and saved)\ntrain_loop: restart 1 of 100\n"
        "training, then 43\ntrain_loop: exit code 43 (no step came to its end: the watchdog)\ntrain_loop: restart 2 of 100\n"
        "training, then 0\ntrain_loop: exit code 0\n")


def test_the_log_is_whole_when_the_loop_ends(tmp_path):
    """systemd kills what is left of a service when its first process has ended."""
    executable(tmp_path / "tee", f'sleep 0.5\nexec {shutil.which("tee")} "$@"\n')
    done = subprocess.run(["bash", TPU / "train_loop.sh", "--log", tmp_path / "log", "--", "echo", "the last line"], timeout=20, check=False,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 0
    assert (tmp_path / "log").read_text() == "the last line\ntrain_loop: exit code 0\n"


@pytest.fixture
def started(tmp_path):
    """started(python, *flags) -> the loop around a python of this text, under way in a session of its own, which ends with the test."""
    processes = []

    def start(python, *flags):
        executable(tmp_path / "python", python)
        processes.append(subprocess.Popen(["bash", TPU / "train_loop.sh", "--pause", "30", *flags, "--", "./python"], cwd=tmp_path, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True))
        return processes[-1]

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("to, log", [(os.kill, ()), (os.kill, ("--log", "log")), (os.killpg, ("--log", "log"))])
def test_sigterm_reaches_the_command_which_saves_and_is_not_restarted(started, to, log):
    """to: os.kill as systemd and Kubernetes do, os.killpg as a terminal does."""
    process = started("trap 'sleep 0.5; echo saved; exit 42' TERM\necho up\nwhile :; do sleep 0.05 || true; done\n", *log)
    assert process.stdout.readline() == "up\n"
    to(process.pid, signal.SIGTERM)
    rest, _ = process.communicate(timeout=10)
    told = [line for line in rest.splitlines() if "Terminated" not in line]  # bash's word on a `sleep` in the killed group
    assert told == ["saved", "train_loop: exit code 42 (asked to stop, and saved)"] and process.returncode == 42


def test_sigterm_in_the_pause_ends_the_loop(started):
    process = started("exit 43\n")
    assert process.stdout.readline().startswith("train_loop: exit code 43")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=10)
    assert rest == "" and process.returncode == 43


def test_the_start_up_script_trains_until_the_run_is_done(dry, tmp_path):
    """The service that the start-up script starts, as systemd would run it, with a python that is preempted, hangs, and comes to the end."""
    script = startup_script(dry(CREATE, TRAINING))
    service = shlex.split(script[script.index("systemd-run"):])
    command = [str(tmp_path / "log") if word == "/var/log/vino_train.log" else word for word in service[service.index("bash"):]]
    environment = dict(word.removeprefix("--setenv=").split("=", 1) for word in service if word.startswith("--setenv="))
    at = tmp_path / "code"
    executable(at / ".venv" / "bin" / "python", PYTHON)
    shutil.copytree(TPU, at / "launch" / "tpu")
    loop_script = at / "launch" / "tpu" / "train_loop.sh"
    loop_script.write_text(re.sub(r"pause=\d+", "pause=0", loop_script.read_text()))
    (at / "codes").write_text("42\n43\n0\n")
    done = subprocess.run(command, cwd=at, env={**os.environ, **environment}, timeout=20, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (at / "calls").read_text().splitlines() == [" ".join(["1", *COMMAND])] * 3
    assert (tmp_path / "log").read_text().count("training, then ") == 3


def test_all_ways_restart_on_the_same_codes(dry):
    told = {"44", *re.findall(r"^  \[(\d+)\]=", (TPU / "train_loop.sh").read_text(), re.M)}  # 44: where all hosts start anew
    words = shlex.split(dry(XPK, TRAINING)[-1])
    assert told == set(words[words.index("--restart-on-exit-codes") + 1].split(","))
    assert told == {str(code) for code in json.loads(re.search(r"values: (\[.*?\])", "\n".join(dry(JOBSET, TRAINING)))[1])}

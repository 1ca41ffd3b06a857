"""The doctor: every trouble that people have with GPU, driver, libraries and disk is told with what mends it.

nvidia-smi is a script that prints what the real one does, for there is no GPU where the tests run.
"""

import io
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch
from huggingface_hub import constants
from rich.console import Console

from kdguard import doctor, gpu
from kdguard.doctor import OK, WARNING, WRONG, Check, software
from kdguard.doctor import trial as trials
from kdguard.doctor.graphics import Driver, build, runs_on
from kdguard.doctor.trial import Trial
from kdguard.errors import KdguardError
from kdguard.terminal import print_checks
from tests.test_cli import kdguard

pytestmark = pytest.mark.skipif(os.name == "nt", reason="nvidia-smi is a shell script here")

RTX_4090 = "GPU-4090, 580.95.05, 24564, 24110, Disabled, 8.9, NVIDIA GeForce RTX 4090"
RTX_5090 = "GPU-5090, 570.86.10, 32607, 31500, Enabled, 12.0, NVIDIA GeForce RTX 5090"
GTX_1080 = "GPU-1080, 580.95.05, 8192, 8000, Enabled, 6.1, NVIDIA GeForce GTX 1080"
BANNER = "| NVIDIA-SMI {0}             Driver Version: {0}     CUDA Version: {1}     |"
NEW_BANNER = "| NVIDIA-SMI {0}              KMD Version: {0}     CUDA UMD Version: {1}     |"
FOR_13 = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
FOR_12 = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """`nvidia_smi(gpus, apps, banner)`: from now on there is one that prints these. `script` is it whole."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def install(
        *gpus: str, apps: str = "", banner: str = BANNER.format("580.95.05", "13.0"), script: str | None = None
    ) -> None:
        listed = "\n".join(gpus)
        path = folder / "nvidia-smi"
        path.write_text(
            "#!/bin/sh\n"
            + (
                script
                or f"case \"$*\" in *query-gpu*) echo '{listed}';; *query-compute-apps*) printf '{apps}';; "
                f"*) echo '{banner}';; esac\n"
            )
        )
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.fixture(scope="module")
def trial():
    """What this computer's own libraries do."""
    return doctor.try_out()


def on_gpu(capability=(8, 9), cuda="13.0", architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_120")) -> Trial:
    """What a GPU build of torch tells, which there is none of here."""
    devices = [{"name": "a GPU", "capability": list(capability), "uuid": "GPU-4090"}] if capability else []
    found = {"version": f"2.13.0+cu{cuda.replace('.', '')}", "cuda": cuda, "hip": None, "devices": devices}
    return Trial({"torch": {**found, "architectures": list(architectures)}})


def only(checks: list[Check], what: str) -> Check:
    (check,) = (check for check in checks if check.what == what)
    return check


# --- a computer as it is ----------------------------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_wrong_and_what_it_means_is_said():
    done = kdguard("doctor", "--json", PATH="/nowhere", HF_HUB_OFFLINE="1")
    checks = [Check(**entry) for entry in json.loads(done.stdout)]
    names = ["Python", "system", "GPU", "torch", "bitsandbytes", "libraries", "models", "runs", "memory", "hub"]
    assert [check.what for check in checks] == names
    assert done.returncode == 0 and not [check for check in checks if check.state == WRONG]
    assert all(bool(check.mend) == (check.state != OK) for check in checks)
    assert only(checks, "GPU").state == WARNING and "everything runs on the CPU" in only(checks, "GPU").found
    assert only(checks, "torch").found.startswith(torch.__version__)
    assert only(checks, "bitsandbytes").state == OK and "forward and backward" in only(checks, "bitsandbytes").found
    assert "HF_HUB_OFFLINE" in only(checks, "hub").found and only(checks, "hub").state == OK


def test_a_4_bit_layer_is_close_to_the_plain_product(trial):
    assert trial.failed is None
    assert 0.01 < trial.found["nf4"]["forward"] < 0.2 and 0.01 < trial.found["nf4"]["backward"] < 0.2


def test_the_doctor_needs_none_of_the_libraries_that_it_looks_at():
    code = "import sys, kdguard.doctor; sys.exit(bool({'torch', 'numpy', 'transformers', 'psutil'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- the driver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "banner", "command"),
    [
        (RTX_4090, BANNER.format("580.95.05", "13.0"), FOR_13),
        (RTX_4090, NEW_BANNER.format("610.47", "13.3"), FOR_13),
        (RTX_4090, BANNER.format("550.54.14", "12.4"), FOR_12),
        (GTX_1080, BANNER.format("580.95.05", "13.0"), FOR_12),  # CUDA 13 has left it behind
    ],
)
def test_a_cpu_build_beside_a_gpu_is_wrong_and_the_command_fits_the_driver(nvidia_smi, trial, listed, banner, command):
    nvidia_smi(listed, banner=banner)
    check = doctor.torch_check(doctor.ask_driver(), trial)
    assert (check.state, check.mend) == (WRONG, command)
    assert "without CUDA" in check.found


def test_the_command_ends_with_1_where_something_is_wrong(nvidia_smi):
    nvidia_smi(RTX_4090.replace("24110", "15000"), apps="GPU-4090, 4711, 9000, /usr/bin/python, of mine\\n")
    done = kdguard("doctor", HF_HUB_OFFLINE="1", COLUMNS="80")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert f"  {FOR_13}" in lines  # whole, to be copied
    assert lines[-1].startswith("1 wrong")
    holder = " ".join(done.stdout.split())
    assert "python, of mine (process 4711) holds 8.8 GiB" in holder
    assert "end python, of mine (process 4711) before a run" in holder


def test_a_driver_older_than_torch_takes_an_older_build(nvidia_smi):
    nvidia_smi(RTX_4090, banner=BANNER.format("550.54.14", "12.4"))
    driver = doctor.ask_driver()
    check = doctor.torch_check(driver, on_gpu(None))
    assert (check.state, check.mend) == (WRONG, FOR_12)
    assert "CUDA up to 12.4" in check.found
    assert doctor.driver_check(driver, on_gpu(None))[0].state == OK


@pytest.mark.parametrize(
    ("listed", "cuda"), [(RTX_4090, "11.4"), (RTX_5090, "12.8")], ids=["of CUDA 11", "of CUDA 12 for Blackwell"]
)
def test_a_driver_too_old_for_every_build_has_to_be_renewed(nvidia_smi, listed, cuda):
    nvidia_smi(listed, banner=BANNER.format("470.82", cuda))
    driver = doctor.ask_driver()
    for check in (*doctor.driver_check(driver, on_gpu(None)), doctor.torch_check(driver, on_gpu(None))):
        assert check.state == WRONG and "580" in check.mend and gpu.DRIVERS in check.mend
    assert doctor.driver_check(driver, on_gpu((12, 0), "12.8"))[0].state == OK  # an older torch that uses it


def test_drivers_that_do_not_know_compute_capability_still_tell_the_rest(nvidia_smi):
    nvidia_smi(
        script='case "$*" in *compute_cap*) echo \'Field "compute_cap" is not a valid field to query.\'; exit 2;; '
        "*query-gpu*) echo 'GPU-1, 470.82.01, 11264, 11000, Enabled, GeForce RTX 2080 Ti';; "
        f"*apps*) ;; *) echo '{BANNER.format('470.82.01', '11.4')}';; esac"
    )
    (found,) = gpu.gpus()
    assert (found.name, found.capability, found.total) == ("GeForce RTX 2080 Ti", None, 11)
    assert build(doctor.ask_driver()) is None


def test_several_gpus_are_listed_and_memory_that_is_not_told_is_not_made_up(nvidia_smi):
    unified = "GPU-10, 580.95.05, [N/A], [N/A], Disabled, 12.1, NVIDIA GB10"
    nvidia_smi(RTX_4090, unified, apps="GPU-4090, 7, [N/A], C:\\\\\\\\Windows\\\\\\\\explorer.exe\\n")
    driver = doctor.ask_driver()
    first, second = doctor.graphics(driver, on_gpu())
    assert first.what == "GPU 0" and "runs use this one" in first.found and first.state == OK
    assert "GiB" not in second.found and second.state == OK
    assert driver.processes["GPU-4090"][0] == gpu.Process(7, "explorer.exe", None)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9",
            "communicate",
        ),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "mismatch"),
        ("exec sleep 30", "did not answer"),
    ],
)
def test_an_nvidia_smi_that_fails_or_hangs_is_a_finding(nvidia_smi, monkeypatch, trial, script, message):
    monkeypatch.setattr(gpu, "SECONDS", 0.3)
    nvidia_smi(script=script)
    with pytest.raises(KdguardError, match=message):
        gpu.gpus()
    (check,) = doctor.graphics(doctor.ask_driver(), trial)
    assert check.state == WRONG and message in check.found and "restart" in check.mend


def test_a_gpu_too_old_for_4_bit_is_wrong_where_it_is_the_one_that_runs_use(nvidia_smi):
    maxwell = "GPU-960, 580.95.05, 2048, 2000, Enabled, 5.2, NVIDIA GeForce GTX 960"
    nvidia_smi(maxwell)
    assert doctor.graphics(doctor.ask_driver(), on_gpu(None))[0].state == WRONG
    nvidia_smi(RTX_4090, maxwell)
    assert [check.state for check in doctor.graphics(doctor.ask_driver(), on_gpu())] == [OK, WARNING]


def test_a_driver_without_a_gpu_is_no_trouble(nvidia_smi):
    nvidia_smi(script="echo 'No devices were found'; exit 6")
    assert doctor.ask_driver() == Driver()


# --- torch ------------------------------------------------------------------------------------------------------------


def test_machine_code_runs_within_its_major_capability_and_ptx_on_all_newer_ones():
    assert runs_on((8, 9), ["sm_86"]) and not runs_on((8, 0), ["sm_86"]) and not runs_on((9, 0), ["sm_86"])
    assert runs_on((12, 1), ["sm_120"]) and runs_on((15, 0), ["compute_120"]) and not runs_on((6, 1), ["sm_75"])
    assert runs_on((9, 0), ["sm_90a"])


def test_a_gpu_that_torch_was_not_built_for_and_one_without_bf16(nvidia_smi):
    nvidia_smi(GTX_1080)
    driver = doctor.ask_driver()
    pascal = doctor.torch_check(driver, on_gpu((6, 1)))
    assert (pascal.state, pascal.mend) == (WRONG, FOR_12)
    turing = doctor.torch_check(driver, on_gpu((7, 5)))
    assert turing.state == WARNING and "fp16" in turing.found
    assert doctor.torch_check(driver, on_gpu()) == Check("torch", "2.13.0+cu130, on a GPU, in bf16")


def test_a_hidden_gpu_is_told_by_the_variable_that_hides_it(nvidia_smi, monkeypatch):
    nvidia_smi(RTX_4090)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    hidden = on_gpu(None)
    hidden.torch["unusable"] = "RuntimeError: No CUDA GPUs are available"
    check = doctor.torch_check(doctor.ask_driver(), hidden)
    assert check.state == WARNING and check.mend == "unset CUDA_VISIBLE_DEVICES"


# --- libraries that are broken ----------------------------------------------------------------------------------------

BROKEN = {
    "raises": "raise RuntimeError('CUDA Setup failed despite GPU being available.\\nAnd a page more')",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "import time; time.sleep(60)",
    "is missing": "raise ModuleNotFoundError(\"No module named 'bitsandbytes'\", name='bitsandbytes')",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_bitsandbytes_is_a_finding_and_not_the_end(tmp_path, monkeypatch, how):
    (tmp_path / "bitsandbytes.py").write_text(BROKEN[how])
    monkeypatch.syspath_prepend(tmp_path)
    if how == "hangs":
        monkeypatch.setattr(trials, "SECONDS", 15)
    found = doctor.try_out()
    check = doctor.bitsandbytes_check(found)
    assert found.failed == "bitsandbytes" and "torch" in found.found
    assert check.state == WRONG and check.found.startswith("cannot be imported: ")
    assert check.mend == "pip install --force-reinstall --no-deps bitsandbytes"
    assert "SIGSEGV" in check.found if how == "crashes" else "SIG" not in check.found
    assert "\n" not in check.found and "a page more" not in check.found


def test_a_broken_torch_is_a_finding_through_the_command(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = kdguard("doctor", "--json", PATH="/nowhere", PYTHONPATH=paths, HF_HUB_OFFLINE="1")
    checks = [Check(**entry) for entry in json.loads(done.stdout)]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [check.what for check in checks if check.state == WRONG] == ["torch"]
    assert "libcudart.so.13" in only(checks, "torch").found
    assert only(checks, "torch").mend.startswith("pip install --force-reinstall torch")
    assert "torch cannot be imported" in only(checks, "bitsandbytes").found


def test_versions_that_do_not_satisfy_are_mended_by_one_command(monkeypatch, trial):
    needs = ["torch>=2.10", "peft>=0.18", "rensa>=0.5", "rich", 'nothing>=1; extra == "dev"']
    has = {"torch": "2.13.0+cpu", "peft": "0.17.1", "rich": "15.0"}
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    monkeypatch.setattr(software, "installed", has.get)
    check = doctor.libraries(Driver(), trial)
    assert (check.state, check.mend) == (WRONG, 'pip install "peft>=0.18" "rensa>=0.5"')
    assert "peft 0.17.1 (needs >=0.18)" in check.found and "rensa is missing" in check.found
    has |= {"peft": "0.18.0", "rensa": "0.5"}
    assert doctor.libraries(Driver(), trial).state == OK


def test_a_library_that_cannot_be_imported_is_named(trial):
    broken = Trial(trial.found, "libraries", "ImportError: libarrow.so", "pyarrow.lib")
    check = doctor.libraries(Driver(), broken)
    assert check.state == WRONG and check.mend == "pip install --force-reinstall --no-deps pyarrow"


# --- disk, memory, network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "states"), [(100, [OK, OK]), (10, [WARNING, OK]), (3, [WARNING] * 2), (0, [WRONG] * 2)]
)
def test_room_on_the_disk(monkeypatch, free, states):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free * 10**9))
    checks = doctor.disks()
    assert [check.state for check in checks] == states
    if states[0] != OK:
        assert "hf cache rm" in checks[0].mend and "HF_HOME" in checks[0].mend and "16 GB" in checks[0].found
    if states[1] != OK:
        assert "--out" in checks[1].mend


def test_the_commands_of_the_hub_that_are_named_exist():
    for command in (["cache", "ls"], ["cache", "rm"], ["auth", "login"]):
        done = subprocess.run([Path(sys.executable).with_name("hf"), *command, "--help"], capture_output=True)
        assert done.returncode == 0


def test_little_memory_is_a_warning(monkeypatch):
    assert doctor.memory().state in (OK, WARNING)
    little = namedtuple("memory", "available total")(2 * 2**30, 8 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    assert doctor.memory().state == WARNING and "2.0 of 8.0 GiB" in doctor.memory().found


def test_the_hub_is_asked_and_a_token_is_told_but_never_shown(monkeypatch):
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        there = doctor.hub()
        server.shutdown()
    assert there.state == OK and "a token is there" in there.found and "hf_secret" not in there.found
    away = doctor.hub()
    assert away.state == WARNING and "cannot be reached" in away.found


# --- systems, and what is printed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "state", "said"),
    [
        ("Linux", OK, "Linux"),
        ("Windows", WARNING, "NVIDIA GPUs are supported"),
        ("Darwin", WARNING, "on the CPU alone"),
    ],
)
def test_what_works_on_each_system_is_said(monkeypatch, name, state, said):
    monkeypatch.setattr(platform, "system", lambda: name)
    check = doctor.system()
    assert check.state == state and said in check.found


def test_a_look_that_fails_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "try_out", lambda: Trial({}, "torch", "it crashed"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: 1 / 0)
    monkeypatch.setattr(doctor, "hub", lambda: Check("hub", ""))
    check = only(doctor.examine(), "memory")
    assert check.state == WARNING and "ZeroDivisionError" in check.found and check.mend


@pytest.mark.parametrize("width", [40, 80, 140])
def test_findings_fit_the_terminal_and_commands_stay_whole(width):
    out = Console(file=io.StringIO(), width=width, highlight=False, emoji=False)
    hostile = "no [bold]such[/] thing \x1b[2J" + " and so on" * 20
    print_checks(out, [Check("torch", hostile, WRONG, FOR_13), Check("GPU", "a" * 200)])
    shown = out.file.getvalue()
    assert f"  {FOR_13}\n" in shown and "[bold]such[/]" in shown and "\x1b" not in shown
    assert max(len(line) for line in shown.splitlines() if FOR_13 not in line) <= width
    shown.encode("cp1252")

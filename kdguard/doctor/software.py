"""Can bitsandbytes compute, and are the libraries there, new enough and whole?"""

import os
from importlib import metadata

from kdguard.doctor.check import WARNING, WRONG, Check
from kdguard.doctor.graphics import INDEX, Driver, build
from kdguard.doctor.machine import unset
from kdguard.doctor.trial import Trial


def bitsandbytes_check(trial: Trial) -> Check:
    """Does a 4-bit layer compute what it should?"""
    if trial.failed in ("torch", "libraries"):
        return Check("bitsandbytes", f"not tried, for {trial.failed} cannot be imported", WARNING, "mend that first")
    said = trial.found.get("bitsandbytes", {}).get("version", "")
    if trial.failed in ("bitsandbytes", "nf4"):
        failed = "cannot be imported" if trial.failed == "bitsandbytes" else f"{said} does not compute"
        chosen = next((name for name in ("BNB_CUDA_VERSION", "BNB_ROCM_VERSION") if name in os.environ), None)
        # --no-deps: else pip would bring another torch, on Windows one without CUDA
        mend = unset(chosen) if chosen else "pip install --force-reinstall --no-deps bitsandbytes"
        return Check("bitsandbytes", f"{failed}: {trial.error}", WRONG, mend)
    nf4 = trial.found["nf4"]
    where = {"cuda": "the GPU", "cpu": "the CPU"}[nf4["device"]]
    return Check("bitsandbytes", f"{said}: a 4-bit layer computes forward and backward on {where} in {nf4['dtype']}")


def libraries(driver: Driver, trial: Trial) -> Check:
    """Do the installed versions satisfy what kdguard declares, and can they be imported?"""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(line) for line in metadata.requires("kdguard") or ()]
    except metadata.PackageNotFoundError:
        return Check("libraries", "kdguard itself is not installed, only its files are here", WARNING, "pip install .")
    needed = [each for each in declared if not each.marker or each.marker.evaluate({"extra": ""})]
    has = {each.name: installed(each.name) for each in needed}
    unmet = [
        each for each in needed if not (mine := has[each.name]) or not each.specifier.contains(mine, prereleases=True)
    ]
    if unmet:
        said = [f"{each.name} {has[each.name] or 'is missing'} (needs {each.specifier})" for each in unmet]
        command = "pip install " + " ".join(f'"{each.name}{each.specifier}"' for each in unmet)
        if driver.gpus and build(driver) and "torch" in [each.name for each in unmet]:
            command += f" --extra-index-url {INDEX}/{build(driver)}"
        return Check("libraries", ", ".join(said), WRONG, command)
    if trial.failed == "libraries":
        owner = metadata.packages_distributions().get((trial.module or "").split(".")[0])
        broken = owner or [f'"{name}"' for name in (trial.module, "transformers", "peft", "accelerate") if name]
        command = f"pip install --force-reinstall --no-deps {' '.join(dict.fromkeys(broken))}"
        return Check("libraries", f"cannot be imported: {trial.error}", WRONG, command)
    shown = ", ".join(
        f"{name} {has[name]}" for name in ("transformers", "peft", "accelerate", "gradio") if has.get(name)
    )
    return Check("libraries", f"all {len(needed)} are new enough: {shown} and others")


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

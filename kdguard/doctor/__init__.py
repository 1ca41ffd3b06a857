"""The story of `kdguard doctor`: what a run needs of this computer, what is wrong with it, and what mends it.

It imports nothing that may be missing or broken: torch and what builds on it are tried out in another process.
"""

from collections.abc import Callable

from kdguard.doctor.check import OK, WARNING, WRONG, Check
from kdguard.doctor.graphics import ask_driver, driver_check, graphics, torch_check
from kdguard.doctor.machine import disks, hub, memory, python, system
from kdguard.doctor.software import bitsandbytes_check, libraries
from kdguard.doctor.trial import try_out

__all__ = ["OK", "WARNING", "WRONG", "Check", "examine"]


def examine(phase: Callable[[str], object] = lambda name: None) -> list[Check]:
    """Look at everything that a run needs. `phase` is told what is being looked at.

    What is missing or broken is a Check, not an error.
    """
    phase("ask the driver")
    driver = ask_driver()
    phase("try libraries")
    trial = try_out()
    phase("look around")
    looks: dict[str, Callable[[], Check | list[Check]]] = {
        "Python": python,
        "system": system,
        "GPU": lambda: graphics(driver, trial),
        "driver": lambda: driver_check(driver, trial),
        "torch": lambda: torch_check(driver, trial),
        "bitsandbytes": lambda: bitsandbytes_check(trial),
        "libraries": lambda: libraries(driver, trial),
        "disk": disks,
        "memory": memory,
        "hub": hub,
    }
    checks: list[Check] = []
    for what, look in looks.items():
        try:
            found = look()
        except Exception as error:  # the library that it is looked at with may be the broken one
            found = Check(what, f"could not be looked at ({type(error).__name__}: {error})", WARNING, "pip check")
        checks += [found] if isinstance(found, Check) else found
    return checks

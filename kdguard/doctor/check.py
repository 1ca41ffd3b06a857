"""What the doctor has to say of one thing."""

from dataclasses import dataclass

OK, WARNING, WRONG = "ok", "warning", "wrong"


@dataclass(frozen=True)
class Check:
    """One finding. mend: a command or a step to take, empty where there is nothing to do."""

    what: str
    found: str
    state: str = OK
    mend: str = ""

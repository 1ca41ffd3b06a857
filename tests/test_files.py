"""Files that appear whole: on the disk before they have their name, and their name before anybody counts on it."""

import os
from pathlib import Path

import pytest

from kdguard.files import write_whole, writing_folder


@pytest.fixture
def done(monkeypatch) -> list[tuple[str, str]]:
    """What is done to which file: a kill keeps what the system has in memory, a power loss keeps what was synced."""
    found: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def synced(handle: int) -> None:
        found.append(("sync", Path(f"/proc/self/fd/{handle}").resolve().name))
        fsync(handle)

    def replaced(old, new) -> None:
        found.append(("rename", Path(new).name))
        replace(old, new)

    def renamed(self, new):
        found.append(("rename", Path(new).name))
        return rename(self, new)

    if not Path("/proc/self/fd").exists():
        pytest.skip("this system does not tell what a file handle is of")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(Path, "rename", renamed)
    return found


def test_a_file_is_synced_then_renamed_and_then_its_folder_is_synced(done, tmp_path):
    write_whole(tmp_path / "report.json", "{}")
    assert done == [("sync", "report.json.part"), ("rename", "report.json"), ("sync", tmp_path.name)]


def test_a_folder_is_synced_with_all_that_is_in_it(done, tmp_path):
    for _ in range(2):
        done.clear()
        with writing_folder(tmp_path / "adapter") as beside:
            (beside / "deep").mkdir()
            (beside / "deep" / "weights").write_text("1")
    synced = [name for what, name in done[: done.index(("rename", ".adapter.old"))] if what == "sync"]
    assert set(synced) == {"deep", "weights", ".adapter.part"} and synced[-1] == ".adapter.part"
    assert done[-3:] == [("rename", ".adapter.old"), ("rename", "adapter"), ("sync", tmp_path.name)]

"""The names in a run's folder."""

from __future__ import annotations

from pathlib import Path

from prelora_ds.run.folder import RunFolder


def test_every_name_is_unique_and_only_the_supervisor_s_is_outside_the_folder() -> None:
    folder = RunFolder(Path("out/run"))
    names = [name for name, value in vars(RunFolder).items()
             if isinstance(value, property) and name not in ("logs", "events_to_read")]
    paths = [getattr(folder, name) for name in names]
    assert len({str(path) for path in paths}) == len(paths) > 10
    assert [name for name, path in zip(names, paths, strict=True) if folder.path not in path.parents] == ["supervise"]
    assert folder.supervise == Path("out/run.supervise")
    assert set(folder.logs) <= set(paths)


def test_a_folder_of_checkpoints_may_be_that_of_a_run() -> None:
    folder = RunFolder(Path("out/run"))
    assert RunFolder.of_checkpoints(folder.checkpoints) == folder
    assert RunFolder.of_checkpoints(Path("kept/best")) is None

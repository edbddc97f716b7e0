"""Recorded frames must show the game as it will be played."""

from pathlib import Path

import pytest

from lapo.data.checks import check_frames
from lapo.errors import UserError


def test_frames_must_show_the_game_as_it_will_be_played(tmp_path: Path) -> None:
    folder = tmp_path / "maze"
    with pytest.raises(UserError, match=rf"--env maze --visuals plain --data-dir {tmp_path}`$"):
        check_frames("maze", folder, "plain")
    with pytest.raises(UserError, match=r"--visuals full .* or download it with `bash setup_data.sh maze`$"):
        check_frames("maze", folder, "full")
    folder.mkdir()
    for record, visuals in ((None, "full"), ("{}", "full"), ('{"visuals": "plain"}', "plain")):
        if record:
            (folder / "dataset.json").write_text(record)
        other = "plain" if visuals == "full" else "full"
        check_frames("maze", folder, visuals)
        with pytest.raises(
            UserError, match=f"with visuals {visuals}, but visuals is {other}; choose --visuals"
        ):
            check_frames("maze", folder, other)
    (folder / "dataset.json").write_text("[]")
    with pytest.raises(UserError, match=r"dataset.json is damaged"):
        check_frames("maze", folder, "full")
    folder.rename(tmp_path / "holiday")
    check_frames("holiday", tmp_path / "holiday", "plain")  # anyone's frames are not played

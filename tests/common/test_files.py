"""Folders that cannot be used are said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditherps.errors import UserError
from ditherps.files import claimed, make


def test_a_folder_that_cannot_be_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="choose another folder"):
            make(folder)
    make(tmp_path / "new" / "below")
    make(tmp_path / "new" / "below")
    assert (tmp_path / "new" / "below").is_dir()


def test_a_folder_belongs_to_one(tmp_path: Path) -> None:
    with claimed(tmp_path / "run"), pytest.raises(UserError), claimed(tmp_path / "run"):
        pass
    with claimed(tmp_path / "run"):
        pass

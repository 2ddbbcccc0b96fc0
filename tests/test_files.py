import json
from pathlib import Path

import pytest

from bmf_matryoshka import files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"ü": [1, 2]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": [1, 2]}
    assert "ü" in path.read_text(encoding="utf-8")

    def cut_short(part: Path, text: str, encoding: str) -> int:
        part.write_bytes(text.encode(encoding)[:3])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", cut_short)
    with pytest.raises(OSError, match="no space left"):
        files.write_json(path, {"other": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": [1, 2]}
    assert list(path.parent.iterdir()) == [path]

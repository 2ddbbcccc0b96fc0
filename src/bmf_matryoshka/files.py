"""Files that are whole or absent: written beside, then renamed."""

import json
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a text file, making its folder; what stood there before stays until the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

import struct
from pathlib import Path

import numpy as np
import pytest

from bmf_matryoshka import bundle


def test_dequantize_follows_the_format() -> None:
    low, high = np.arange(16) % 16, (np.arange(16) + 5) % 16
    block = np.float16(0.5).tobytes() + bytes(int(a) | int(b) << 4 for a, b in zip(low, high, strict=True))
    values = bundle.dequantize(block * 2, 64)
    wanted = np.concatenate([(low - 8) * 0.5, (high - 8) * 0.5])
    np.testing.assert_array_equal(values, np.tile(wanted, 2).astype(np.float32))


@pytest.mark.parametrize(("size", "count"), [(18, 33), (17, 32), (36, 32)])
def test_dequantize_refuses_a_wrong_size(size: int, count: int) -> None:
    with pytest.raises(bundle.BundleError, match="cannot hold"):
        bundle.dequantize(bytes(size), count)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not a bundle"),
        (b"GGUF" + bytes(100), "does not start with E5S1"),
        (b"E5S1" + struct.pack("<I", 9) + bytes(100), "format version 9"),
        (b"E5S1" + struct.pack("<I", 1) + bytes(10), "truncated or not a bundle"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bundle.bin"
    path.write_bytes(content)
    with pytest.raises(bundle.BundleError, match=message):
        bundle.read_bundle(path)


def test_a_truncated_file_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    from bmf_matryoshka import base_models

    whole = bundle.bundle_path().read_bytes()
    path = tmp_path / "bundle.bin"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(bundle.BundleError, match="truncated"):
        base_models.unpack_bundle(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()

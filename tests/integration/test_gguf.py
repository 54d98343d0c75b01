# SPDX-License-Identifier: Apache-2.0
"""GGUF files written by the package `gguf`: numbers bit for bit, tokenizers, logits."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
gguf = pytest.importorskip("gguf")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

QUANTISABLE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
TYPES = [*QUANTISABLE, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def random_blocks(name: str, blocks: int, seed: int = 1) -> Any:
    """Bytes of a type; any bits but those that make its scales NaN or infinite."""
    kind = gguf.GGMLQuantizationType[name]
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (blocks, size), dtype=np.uint8)
    halves = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108],
              "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "F16": [0], "BF16": [0], "F32": [2]}[name]
    for at in halves:  # exponents of f16, bf16 and f32 alike: the highest bit below the sign stays 0
        data[:, at + 1] &= 0xBF
    return data, numbers


def write_tensors(path: Path, tensors: dict[str, tuple[Any, Any]]) -> None:
    """name -> (rows of bytes or numbers, type)."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def widened(tessera: Path, path: Path, out: Path) -> dict[str, Any]:
    done = subprocess.run([tessera, "tensors", path, "--out", out], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stderr
    return safetensors_numpy.load_file(out)


@pytest.mark.parametrize("name", TYPES)
def test_blocks_of_any_bits(tessera: Path, tmp_path: Path, name: str) -> None:
    """Random bits widen to the same bits as in the package."""
    kind = gguf.GGMLQuantizationType[name]
    data, numbers = random_blocks(name, 60)
    rows = data.reshape(3, -1)
    stored = {"F32": np.float32, "F16": np.float16}.get(name)
    write_tensors(tmp_path / "x.gguf", {"t": (rows.view(stored) if stored else rows, kind)})
    found = widened(tessera, tmp_path / "x.gguf", tmp_path / "x.safetensors")["t"]
    expected = gguf.quants.dequantize(rows.view(stored) if stored else rows, kind).astype(np.float32)
    assert found.shape == (3, 20 * numbers)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", QUANTISABLE)
def test_quantised_numbers(tessera: Path, tmp_path: Path, name: str) -> None:
    """Numbers that the package quantised come back as it dequantises them."""
    kind = gguf.GGMLQuantizationType[name]
    numbers = np.random.default_rng(7).normal(size=(5, 256)).astype(np.float32)
    stored = gguf.quants.quantize(numbers, kind)
    write_tensors(tmp_path / "x.gguf", {"t": (stored, kind)})
    found = widened(tessera, tmp_path / "x.gguf", tmp_path / "x.safetensors")["t"]
    assert np.array_equal(found, gguf.quants.dequantize(stored, kind).astype(np.float32))
    assert np.abs(found - numbers).max() < 0.4


def test_listing(tessera: Path, tmp_path: Path) -> None:
    """Names, types and shapes, the last axis contiguous."""
    write_tensors(tmp_path / "x.gguf", {"a": (np.zeros((2, 3, 4), np.float32), gguf.GGMLQuantizationType.F32)})
    done = subprocess.run([tessera, "tensors", tmp_path / "x.gguf", "--json"], capture_output=True, text=True,
                          timeout=60, check=True)
    assert json.loads(done.stdout)["tensors"] == [{"name": "a", "type": "F32", "shape": [2, 3, 4], "bytes": 96}]

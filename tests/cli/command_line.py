"""What the tests of the command line share: running it, and safetensors files without any library."""

import json
import math
import os
import pathlib
import random
import struct
import subprocess
import tempfile
import unittest

BINARY = os.environ["TESSERA_CLI"]
FORMATS = {"F32": "f", "F64": "d", "F16": "e", "U8": "B", "BF16": "H", "I32": "i"}


def encode(dtype, values):
    """Little-endian bytes of the values; bf16 by truncation of values that it holds exactly."""
    if dtype == "BF16":
        values = [struct.unpack("<I", struct.pack("<f", x))[0] >> 16 for x in values]
    return struct.pack(f"<{len(values)}{FORMATS[dtype]}", *values)


def safetensors_bytes(tensors):
    """tensors: name -> (dtype, shape, bytes)."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def read_safetensors(path):
    """name -> (dtype, shape, values)."""
    content = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        raw = content[8 + length + begin : 8 + length + end]
        values = struct.unpack(f"<{math.prod(info['shape'])}{FORMATS[info['dtype']]}", raw)
        if info["dtype"] == "BF16":
            values = struct.unpack(f"<{len(values)}f", b"".join(struct.pack("<I", x << 16) for x in values))
        tensors[name] = (info["dtype"], info["shape"], values)
    return tensors


def normal_tensor(seed, shape, dtype="F32"):
    """Normal values rounded so that every dtype holds them exactly."""
    generator = random.Random(seed)
    values = [round(generator.gauss(0, 1) * 16) / 16 for _ in range(math.prod(shape))]
    return dtype, list(shape), encode(dtype, values)


def decode(tensor):
    """Values of (dtype, shape, bytes) as floats."""
    dtype, shape, raw = tensor
    if dtype == "BF16":
        words = struct.unpack(f"<{math.prod(shape)}H", raw)
        return [struct.unpack("<f", struct.pack("<I", word << 16))[0] for word in words]
    return list(struct.unpack(f"<{math.prod(shape)}{FORMATS[dtype]}", raw))


class CommandLineTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)

    def run_tessera(self, *arguments, environment=None):
        return subprocess.run(
            [BINARY, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=self.directory,
            env={**os.environ, **(environment or {})},
        )

    def succeed(self, *arguments):
        """Standard output of a run that must succeed."""
        result = self.run_tessera(*arguments)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout

    def succeed_json(self, *arguments):
        return json.loads(self.succeed(*arguments, "--json"))

    def refuse(self, *arguments, saying, environment=None):
        """The run must exit 2 with one line on standard error that contains every one of these texts, and leave no
        file behind."""
        before = sorted(self.directory.iterdir())
        result = self.run_tessera(*arguments, environment=environment)
        self.assertEqual(result.returncode, 2, (arguments, result.stdout, result.stderr))
        self.assertEqual(result.stdout, "")
        lines = result.stderr.splitlines()
        self.assertEqual(len(lines), 1, result.stderr)
        self.assertTrue(lines[0].startswith("tessera: "), lines[0])
        for text in [saying] if isinstance(saying, str) else saying:
            self.assertIn(text, lines[0])
        self.assertEqual(sorted(self.directory.iterdir()), before, "a failed command left a file behind")

    def write(self, name, content):
        path = self.directory / name
        path.write_bytes(content)
        return path

    def write_qkv(self, name="qkv.safetensors", q=(1, 4, 24, 16), k=(1, 2, 24, 16), v=(1, 2, 24, 16), dtype="F32"):
        tensors = {
            "q": normal_tensor(1, q, dtype),
            "k": normal_tensor(2, k, dtype),
            "v": normal_tensor(3, v, dtype),
        }
        return self.write(name, safetensors_bytes(tensors))

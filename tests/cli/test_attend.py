"""tessera attend: its answer, its files, its JSON, and every way to call it wrongly."""

import json
import math
import struct

from command_line import CommandLineTest, decode, encode, normal_tensor, read_safetensors, safetensors_bytes


def attention(q, k, v, q_heads, kv_heads, queries, keys, dim, value_dim, scale, sees):
    """Plain attention of flat lists; sees(query, key) says which pairs count. Returns o and lse."""
    o, lse = [], []
    for head in range(q_heads):
        kv_head = head * kv_heads // q_heads
        for i in range(queries):
            row = q[(head * queries + i) * dim :][:dim]
            scores = {}
            for j in range(keys):
                if sees(i, j):
                    key = k[(kv_head * keys + j) * dim :][:dim]
                    scores[j] = scale * math.fsum(a * b for a, b in zip(row, key))
            top = max(scores.values())
            total = math.fsum(math.exp(s - top) for s in scores.values())
            lse.append(top + math.log(total))
            for x in range(value_dim):
                o.append(
                    math.fsum(
                        math.exp(s - top) / total * v[(kv_head * keys + j) * value_dim + x] for j, s in scores.items()
                    )
                )
    return o, lse


class AnswerTest(CommandLineTest):
    def check_answer(self, arguments, sees, dtype="F32", queries=24, value_dim=16, scale=0.25, tolerance=1e-5):
        q, k, v = (1, 4, queries, 16), (1, 2, 24, 16), (1, 2, 24, value_dim)
        tensors = [normal_tensor(seed, shape, dtype) for seed, shape in ((1, q), (2, k), (3, v))]
        path = self.write_qkv(q=q, k=k, v=v, dtype=dtype)
        self.succeed("attend", "--qkv", path, "--out", "o.safetensors", *arguments)
        written = read_safetensors(self.directory / "o.safetensors")
        self.assertEqual(set(written), {"o", "lse"})
        self.assertEqual(written["o"][:2], (dtype, [1, 4, queries, value_dim]))
        self.assertEqual(written["lse"][:2], ("F32", [1, 4, queries]))
        o, lse = attention(*map(decode, tensors), 4, 2, queries, 24, 16, value_dim, scale, sees)
        self.assertLess(max(abs(a - b) for a, b in zip(written["o"][2], o)), tolerance)
        self.assertLess(max(abs(a - b) for a, b in zip(written["lse"][2], lse)), max(tolerance, 1e-4))

    def test_dense(self):
        self.check_answer([], lambda i, j: True)

    def test_causal(self):
        self.check_answer(["--causal"], lambda i, j: j <= i)

    def test_causal_is_bottom_right_aligned(self):
        self.check_answer(["--causal"], lambda i, j: j <= i + 17, queries=7)

    def test_query_offset(self):
        self.check_answer(["--causal", "--q-offset", "3"], lambda i, j: j <= i + 3, queries=7)

    def test_grid_and_text(self):
        self.check_answer(["--grid", "2x3x3", "--prefix", "2", "--suffix", "4"], lambda i, j: True)

    def test_window(self):
        self.check_answer(
            ["--causal", "--method", "window:left=4"], lambda i, j: i - 4 <= j <= i
        )

    def test_scale_and_value_dim(self):
        self.check_answer(["--scale", "0.5"], lambda i, j: True, value_dim=24, scale=0.5)

    def test_dtypes(self):
        for dtype in ("BF16", "F16"):
            with self.subTest(dtype):
                self.check_answer(["--causal"], lambda i, j: j <= i, dtype=dtype, tolerance=0.03)

    def test_every_kernel_and_instruction_set(self):
        listed = self.succeed("attend", "--help")
        for isa in [name for name in ("portable", "avx2", "avx512", "avx512_bf16") if f" {name}" in listed]:
            with self.subTest(isa):
                self.check_answer(["--isa", isa, "--causal", "--threads", "2"], lambda i, j: j <= i)
        self.check_answer(["--kernel", "reference"], lambda i, j: True)


class JsonTest(CommandLineTest):
    def test_keys(self):
        path = self.write_qkv()
        plain = self.succeed_json("attend", "--qkv", path, "--method", "dense")
        self.assertEqual(list(plain), ["method", "density", "plan_ms", "kernel_ms"])
        self.assertEqual(plain["method"], "dense")
        self.assertEqual(plain["density"], 1)
        self.assertGreater(plain["kernel_ms"], 0)
        compared = self.succeed_json("attend", "--qkv", path, "--method", "dense", "--causal", "--compare")
        self.assertEqual(list(compared), ["method", "density", "plan_ms", "kernel_ms", "error"])
        self.assertEqual(list(compared["error"]), ["rel_l2", "max_abs", "softmax_mass"])
        self.assertLess(compared["error"]["rel_l2"], 1e-5)
        self.assertAlmostEqual(compared["error"]["softmax_mass"], 1, places=5)

    def test_a_selection_loses_mass(self):
        path = self.write_qkv()
        window = self.succeed_json("attend", "--qkv", path, "--causal", "--compare", "--method", "window:left=4")
        self.assertAlmostEqual(window["density"], (24 * 5 - 10) / (24 * 25 / 2))
        self.assertGreater(window["error"]["rel_l2"], 0.01)
        self.assertLess(window["error"]["softmax_mass"], 0.95)

    def test_mask_is_what_was_computed(self):
        path = self.write_qkv()
        self.succeed("attend", "--qkv", path, "--causal", "--method", "window:left=4", "--mask-out", "m.safetensors")
        dtype, shape, mask = read_safetensors(self.directory / "m.safetensors")["mask"]
        self.assertEqual((dtype, shape), ("U8", [1, 4, 24, 24]))
        wanted = [1 if i - 4 <= j <= i else 0 for _ in range(4) for i in range(24) for j in range(24)]
        self.assertEqual(list(mask), wanted)

    def test_plan_file(self):
        path = self.write_qkv()
        self.succeed("attend", "--qkv", path, "--method", "streaming", "--causal", "--plan-out", "plan.safetensors")
        self.assertIn("entry_begin", " ".join(read_names(self.directory / "plan.safetensors")))

    def test_recurrence(self):
        # Unit keys e_0, e_1, ...: with beta 1 and no decay a query that equals a key reads its value.
        unit = encode("F32", [1.0 if d == n else 0.0 for n in range(8) for d in range(8)])
        v = normal_tensor(3, (1, 1, 8, 8))
        tensors = {"q": ("F32", [1, 1, 8, 8], unit), "k": ("F32", [1, 1, 8, 8], unit), "v": v}
        tensors["g"] = ("F32", [1, 1, 8], encode("F32", [0.0] * 8))
        tensors["beta"] = ("F32", [1, 1, 8], encode("F32", [1.0] * 8))
        path = self.write("recurrent.safetensors", safetensors_bytes(tensors))
        arguments = ["attend", "--qkv", path, "--method", "gated-deltanet", "--causal", "--scale", "1"]
        report = self.succeed_json(*arguments, "--compare", "--out", "o.safetensors")
        self.assertEqual(report["density"], 0)
        self.assertNotIn("softmax_mass", report["error"])
        o = read_safetensors(self.directory / "o.safetensors")["o"][2]
        self.assertLess(max(abs(a - b) for a, b in zip(o, decode(v))), 1e-4)
        self.assertIn("no plan", self.succeed(*arguments))
        for flag in ("--plan-out", "--mask-out"):
            self.refuse(*arguments, flag, "x", saying="is a recurrence and has no plan")
        self.refuse(*arguments[:4], "kda", "--causal", saying="side input 'g' has shape")

    def test_text(self):
        text = self.succeed("attend", "--qkv", self.write_qkv(), "--compare")
        self.assertIn("dense", text)
        self.assertIn("softmax mass", text)


def read_names(path):
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    return list(json.loads(content[8 : 8 + length]))


class BadShapeTest(CommandLineTest):
    def refuse_shapes(self, saying, **shapes):
        path = self.write_qkv("bad.safetensors", **shapes)
        self.refuse("attend", "--qkv", path, "--out", "o.safetensors", saying=saying)

    def test_heads_do_not_divide(self):
        self.refuse_shapes(["3"], q=(1, 4, 24, 16), k=(1, 3, 24, 16), v=(1, 3, 24, 16))

    def test_head_dims_differ(self):
        self.refuse_shapes(["16", "32"], k=(1, 2, 24, 32))

    def test_kv_lengths_differ(self):
        self.refuse_shapes(["24", "23"], v=(1, 2, 23, 16))

    def test_kv_heads_differ(self):
        self.refuse_shapes(["v"], v=(1, 1, 24, 16))

    def test_batches_differ(self):
        self.refuse_shapes(["2"], q=(2, 4, 24, 16))

    def test_rank(self):
        self.refuse_shapes(["'q'", "[4, 24, 16]", "4 axes"], q=(4, 24, 16))

    def test_empty_axis(self):
        self.refuse_shapes(["0"], q=(1, 4, 0, 16))
        self.refuse_shapes(["0"], k=(1, 2, 0, 16), v=(1, 2, 0, 16))

    def test_dtypes(self):
        tensors = {name: ("I32", [1, 1, 2, 8], encode("I32", [0] * 16)) for name in "qkv"}
        path = self.write("bad.safetensors", safetensors_bytes(tensors))
        self.refuse("attend", "--qkv", path, saying=["'q'", "I32", "F32, BF16 or F16"])

    def test_mixed_dtypes(self):
        tensors = {
            "q": normal_tensor(1, (1, 2, 8, 16)),
            "k": normal_tensor(2, (1, 2, 8, 16), "F16"),
            "v": normal_tensor(3, (1, 2, 8, 16), "BF16"),
        }
        path = self.write("bad.safetensors", safetensors_bytes(tensors))
        self.refuse("attend", "--qkv", path, saying="dtype")

    def test_missing_tensor(self):
        tensors = {"q": normal_tensor(1, (1, 2, 8, 16)), "keys": normal_tensor(2, (1, 2, 8, 16))}
        path = self.write("bad.safetensors", safetensors_bytes(tensors))
        self.refuse("attend", "--qkv", path, saying=["'k'", "bad.safetensors"])


class BadFileTest(CommandLineTest):
    def refuse_bytes(self, content, saying=("bad.safetensors",)):
        path = self.write("bad.safetensors", content)
        self.refuse("attend", "--qkv", path, "--out", "o.safetensors", saying=list(saying))

    def good(self):
        return safetensors_bytes({name: normal_tensor(i, (1, 2, 8, 16)) for i, name in enumerate("qkv")})

    def with_header(self, header, data=b"\0" * 64):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    def test_no_file(self):
        self.refuse("attend", "--qkv", "absent.safetensors", saying="absent.safetensors")
        self.refuse("attend", "--qkv", self.directory, saying=str(self.directory))

    def test_truncated_anywhere(self):
        good = self.good()
        (header,) = struct.unpack_from("<Q", good)
        for length in (0, 1, 7, 8, 9, 8 + header // 2, 8 + header, 8 + header + 1, len(good) - 1):
            with self.subTest(length):
                self.refuse_bytes(good[:length])

    def test_header_length_lies(self):
        good = self.good()
        for length in (2**64 - 1, 2**63, 2**40, len(good), 0, 3):
            with self.subTest(length):
                self.refuse_bytes(struct.pack("<Q", length) + good[8:])

    def test_header_is_no_json_object(self):
        for text in (b"[]", b"{", b"7", b"\xff\xfe\x00", b"{" * 5000, b'{"q": 3}', b'{"q": {}}'):
            with self.subTest(text[:10]):
                self.refuse_bytes(self.with_header(text))

    def entry(self, **changes):
        return {"q": {"dtype": "F32", "shape": [1, 1, 1, 16], "data_offsets": [0, 64], **changes}}

    def test_offsets_lie(self):
        for offsets in ([0, 128], [64, 128], [64, 0], [-64, 0], [0, 2**63], [0, 2**64], [0], [0, 1.5], ["0", "64"], 64):
            with self.subTest(offsets):
                self.refuse_bytes(self.with_header(self.entry(data_offsets=offsets)))

    def test_shapes_lie(self):
        for shape in ([1, 1, 1, 17], [2**32, 2**32, 1, 1], [2**62, 4, 1, 1], [-1, 1, 1, -16], [1, 1, 1, 1.5], "x", 16):
            with self.subTest(shape):
                self.refuse_bytes(self.with_header(self.entry(shape=shape)))

    def test_dtype_lies(self):
        for dtype in ("F64", "U8", "F99", "", 5, None):
            with self.subTest(dtype):
                self.refuse_bytes(self.with_header(self.entry(dtype=dtype)))

    def test_tensors_overlap(self):
        one = {"dtype": "F32", "shape": [1, 1, 1, 16]}
        header = {"q": {**one, "data_offsets": [0, 64]}, "k": {**one, "data_offsets": [32, 96]}}
        self.refuse_bytes(self.with_header(header, b"\0" * 96))

    def test_hole_between_tensors(self):
        one = {"dtype": "F32", "shape": [1, 1, 1, 16]}
        header = {"q": {**one, "data_offsets": [0, 64]}, "k": {**one, "data_offsets": [128, 192]}}
        self.refuse_bytes(self.with_header(header, b"\0" * 192))

    def test_extra_data_at_the_end(self):
        self.refuse_bytes(self.good() + b"more")


class BadArgumentTest(CommandLineTest):
    def test_grid(self):
        self.refuse_arguments("--grid", "2x3x5", saying=["grid is 2x3x5", "24 keys"])
        self.refuse_arguments("--grid", "2x3xy", saying=["2x3xy", "TxHxW"])
        self.refuse_arguments("--prefix", "3", saying=["--grid"])

    def refuse_arguments(self, *arguments, saying, environment=None):
        path = self.write_qkv()
        self.refuse(
            "attend", "--qkv", path, "--out", "o.safetensors", *arguments, saying=saying, environment=environment
        )

    def test_scale(self):
        for scale in ("nan", "inf", "-inf"):
            self.refuse_arguments("--scale", scale, saying=["scale", scale])
        self.refuse_arguments("--scale", "big", saying="--scale")

    def test_unknown_method(self):
        self.refuse_arguments("--method", "windw", saying=["unknown method 'windw'", "did you mean 'window'?"])
        self.refuse_arguments("--method", "", saying="method")

    def test_unknown_parameter(self):
        self.refuse_arguments("--method", "window:lft=3", saying=["'lft'", "'left'"])
        self.refuse_arguments("--method", "window:left", saying="left")
        self.refuse_arguments("--method", "window:left=1,left=2", saying="left")

    def test_parameter_out_of_range(self):
        self.refuse_arguments("--method", "window:left=-2", saying=["left", "-2"])
        self.refuse_arguments("--method", "window:left=1e30", saying="left")
        self.refuse_arguments("--method", "window:left=99999999999999999999", saying="left")
        self.refuse_arguments("--method", "window:left=many", saying=["left", "many"])
        self.refuse_arguments("--method", "xattention:tau=1.5", saying=["tau", "1.5"])
        self.refuse_arguments("--method", "xattention:tau=nan", saying="tau")

    def test_method_file(self):
        self.refuse_arguments("--method", "absent.json", saying="absent.json")
        for text in (b"", b"[1]", b'{"method": 3}', b'{"method": "window", "params": {}}', b'{"method": "windoww"}'):
            with self.subTest(text):
                self.write("method.json", text)
                self.refuse_arguments("--method", "method.json", saying="")
        self.write("method.json", b'{"method": "window", "parameters": {"left": 4}}')
        self.succeed("attend", "--qkv", self.write_qkv(), "--method", "method.json")

    def test_instruction_set(self):
        self.refuse_arguments("--isa", "avx9", saying=["avx9", "avx2"])
        self.refuse_arguments(saying=["avx9", "avx2"], environment={"TESSERA_ISA": "avx9"})

    def test_kernel_and_threads(self):
        self.refuse_arguments("--kernel", "key-minor", saying=["'key-minor'", "'key-major'"])
        self.refuse_arguments("--threads", "-1", saying=["threads", "-1"])
        self.refuse_arguments("--threads", "two", saying="--threads")

    def test_query_offset(self):
        self.refuse_arguments("--causal", "--q-offset", "1.5", saying="--q-offset")

    def test_mask_too_large(self):
        shape = (1, 32, 8200, 1)
        zeros = ("F32", list(shape), bytes(4 * math.prod(shape)))
        path = self.write("long.safetensors", safetensors_bytes({"q": zeros, "k": zeros, "v": zeros}))
        self.refuse("attend", "--qkv", path, "--mask-out", "m.safetensors", saying=["mask", "2^31"])

    def test_output_cannot_be_written(self):
        path = self.write_qkv()
        for option in ("--out", "--plan-out", "--mask-out"):
            with self.subTest(option):
                self.refuse("attend", "--qkv", path, option, "absent/file.safetensors", saying="absent/file.safetensors")

    def test_qkv_is_required(self):
        self.refuse("attend", saying="--qkv")

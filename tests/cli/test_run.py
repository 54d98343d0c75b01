"""`tessera run` with methods that keep the cache their own way, and with a method per layer."""

import json
import os
import tempfile
import unittest

from command_line import CommandLineTest, read_safetensors

MODEL = os.path.join(os.path.dirname(__file__), "..", "..", "models", "tessera-bytes")


class RunCachesTest(CommandLineTest):
    def run_model(self, *arguments):
        with tempfile.TemporaryDirectory() as folder:
            prompt = os.path.join(folder, "prompt.txt")
            with open(prompt, "w", encoding="utf-8") as file:
                file.write("The quick brown fox jumps over the lazy dog. " * 20)
            return self.succeed_json("run", "--model", MODEL, "--prompt", prompt, "-n", "8", "--ignore-eos", *arguments)

    def test_caches(self):
        dense = self.run_model()
        for key in ["cache_mb", "cache_peak_mb", "cache_tokens_kept"]:
            self.assertGreater(dense[key], 0)
        # 8 tokens: 7 of them were decoded.
        self.assertEqual(dense["cache_tokens_kept"], dense["prompt_tokens"] + 7)
        for method, kept in [("snapkv:capacity=100", 107), ("h2o:heavy=60,recent=40", 100)]:
            for arguments in [["--method", method], ["--method", "xattention", "--decode-method", method]]:
                report = self.run_model(*arguments)
                self.assertEqual(report["cache_tokens_kept"], kept)
                self.assertLess(report["cache_mb"], dense["cache_mb"] / 4)
                self.assertLess(report["cache_peak_mb"], dense["cache_peak_mb"] / 2)
                self.assertEqual(len(report["tokens"]), 8)
        whole = self.run_model("--method", "h2o:heavy=2000")
        self.assertEqual(whole["text"], dense["text"])
        quest = self.run_model("--method", "quest:budget=2000")
        self.assertEqual(quest["text"], dense["text"])

    def test_layers(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "layers.json")
            layers = [
                {"layers": "0-1", "method": "dense"},
                {"layers": "2-", "method": "snapkv", "parameters": {"capacity": 100}},
            ]
            with open(path, "w", encoding="utf-8") as file:
                json.dump({"layers": layers}, file)
            for option in ["--method", "--decode-method"]:
                report = self.run_model(option, path)
                self.assertEqual(report["cache_tokens_kept"], (report["prompt_tokens"] + 7 + 107) / 2)
            with open(path, "w", encoding="utf-8") as file:
                json.dump({"layers": layers[:1]}, file)
            self.refuse("run", "--model", MODEL, "--prompt", path, "--method", path, saying="the model has 4")

    def test_report(self):
        """The keys that scripts read, all of them numbers, texts and tokens."""
        report = self.run_model()
        for key in ["prefill_ms", "prefill_tokens_per_s", "attention_ms", "decode_tokens_per_s", "peak_rss_mb", "density",
                    "bits_per_byte"]:  # fmt: skip
            self.assertGreater(report[key], 0, key)
        self.assertEqual((len(report["tokens"]), report["prompt_tokens"]), (8, 901))
        self.assertIsInstance(report["text"], str)
        self.assertIsNone(self.run_model("--no-bits-per-byte")["bits_per_byte"])
        self.refuse("run", "--model", MODEL, "--prompt", "-", "--bits-per-byte", "--no-bits-per-byte", saying="excludes")

    def test_weights(self):
        expected = self.run_model()["tokens"]
        for weights in ["auto", "mapped", "copied"]:
            self.assertEqual(self.run_model("--weights", weights)["tokens"], expected)
        self.refuse("run", "--model", MODEL, "--prompt", "-", "--weights", "huge",
                    saying="--weights: weights is 'huge'; expected auto, mapped or copied")  # fmt: skip

    def test_measure_bandwidth(self):
        report = self.run_model("--measure-bandwidth")
        for key in ["read_gbps", "decode_of_bandwidth", "decode_tokens_per_s", "peak_rss_mb"]:
            self.assertGreater(report[key], 0, key)
        self.assertEqual(report["tokens"], self.run_model()["tokens"])
        self.refuse("run", "--model", MODEL, "--prompt", "-", "--measure-bandwidth", saying="needs --json")

    def test_dump_qkv(self):
        text = "Attention reads queries, keys and values. " * 15
        prompt = self.write("prompt.txt", text.encode())
        whole = self.directory / "qkv.safetensors"
        run = ["run", "--model", MODEL, "--prompt", prompt, "-n", "0"]
        tokens = self.succeed_json(*run, "--dump-qkv", whole)["prompt_tokens"]
        self.assertEqual(tokens, len(text) + 1)
        tensors = read_safetensors(whole)
        self.assertEqual({name: tensor[1] for name, tensor in tensors.items()},
                         {"q": [4, 4, tokens, 64], "k": [4, 2, tokens, 64], "v": [4, 2, tokens, 64]})
        # What a chunked prefill or a cache that evicts attends to is projected from the same layer-0 inputs; chosen
        # layers come in ascending order.
        for arguments in [["--chunk", "300"], ["--method", "snapkv:capacity=100"], ["--kv-dtype", "bf16"]]:
            part = self.directory / "part.safetensors"
            self.succeed(*run, "--dump-qkv", part, "--dump-layers", "3+0", *arguments)
            other = read_safetensors(part)
            for name in "qkv":
                heads = other[name][1][1]
                self.assertEqual(other[name][1], [2, heads, tokens, 64])
                size = heads * tokens * 64
                first = max(abs(a - b) for a, b in zip(other[name][2][:size], tensors[name][2][:size]))
                self.assertLess(first, 1e-4)
                if "--chunk" in arguments:
                    last = max(abs(a - b) for a, b in zip(other[name][2][size:], tensors[name][2][3 * size :]))
                    self.assertLess(last, 1e-2)
        report = self.succeed_json("attend", "--qkv", whole, "--causal", "--method", "xattention:tau=1", "--compare")
        self.assertLess(report["error"]["rel_l2"], 1e-3)

    def test_dump_qkv_errors(self):
        prompt = self.write("prompt.txt", b"abc")
        run = ["run", "--model", MODEL, "--prompt", prompt, "-n", "0"]
        self.refuse(*run, "--dump-layers", "0", saying="--dump-qkv")
        out = self.directory / "qkv.safetensors"
        self.refuse(*run, "--dump-qkv", out, "--dump-layers", "2-4", saying=["--dump-layers=2-4", "0-3"])
        self.refuse(*run, "--dump-qkv", out, "--dump-layers", "x", saying="--dump-layers=x")


if __name__ == "__main__":
    unittest.main()

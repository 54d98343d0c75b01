"""`tessera run` with methods that keep the cache their own way, and with a method per layer."""

import json
import os
import tempfile
import unittest

from command_line import CommandLineTest

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


if __name__ == "__main__":
    unittest.main()

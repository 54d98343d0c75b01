"""`tessera tune`: searches write what `run --method` reads, and leave nothing behind when they fail."""

import json
import os
import signal
import subprocess
import time
import unittest

from command_line import BINARY, CommandLineTest

MODEL = os.path.join(os.path.dirname(__file__), "..", "..", "models", "tessera-bytes")


class TuneTest(CommandLineTest):
    def tune(self, name, *arguments):
        """The file that a search wrote, and what it reported."""
        out = self.directory / f"{name}.json"
        report = self.succeed_json("tune", name, "--model", MODEL, "--out", out, *arguments)
        document = json.loads(out.read_text())
        self.assertEqual(document["method"], name)
        self.assertEqual(report["method"], name)
        self.assertEqual(report["tuned"], document["tuned"])
        return out, document

    def run_with(self, method):
        prompt = self.write("prompt.txt", b"The quick brown fox jumps over the lazy dog. " * 40)
        return self.succeed_json("run", "--model", MODEL, "--prompt", prompt, "-n", "2", "--method", method)

    def test_razor(self):
        out, document = self.tune("razor", "--length", "1000", "--param", "induction=0.0625", "--param", "echo=0")
        heads = document["parameters"]["heads"]["heads"]
        self.assertEqual([[head["class"] for head in layer] for layer in heads],
                         [["span", "span"], ["full", "span"], ["span", "span"], ["span", "span"]])
        dense = self.run_with("dense")
        document["parameters"]["least"] = 100  # of the method: below the prompt's length
        small = self.write("small.json", json.dumps(document).encode())
        self.assertEqual(self.run_with(out)["cache_tokens_kept"], dense["cache_tokens_kept"])
        self.assertLess(self.run_with(small)["cache_tokens_kept"], dense["cache_tokens_kept"] / 2)

    def test_minference(self):
        text = os.path.join(MODEL, "README.md")
        out, document = self.tune("minference", "--length", "2000", "--text", text, "--param", "scale=0.05",
                                  "--param", "first_row=-1")
        self.assertEqual([len(layer) for layer in document["parameters"]["config"]], [4, 4, 4, 4])
        self.assertLess(self.run_with(out)["density"], 0.9)

    def test_xattention(self):
        for form in ["profile", "program"]:
            out, document = self.tune("xattention", "--length", "2000", "--param", f"form={form}", "--param", "block=64")
            thresholds = document["parameters"]["thresholds"]
            self.assertEqual([len(layer) for layer in thresholds], [4, 4, 4, 4])
            self.assertLess(self.run_with(out)["density"], 1)

    def test_duo(self):
        out, document = self.tune("duo", "--length", "600", "--threads", "1", "--param", "steps=60",
                                  "--param", "learning_rate=0.05", "--param", "style=digits", "--param", "passkeys=3",
                                  "--param", "sink=16", "--param", "recent=48", "--param", "sparsity=0.875")
        heads = document["parameters"]["heads"]["heads"]
        # All but the head of the model's induction circuit stream.
        self.assertEqual([[head["class"] for head in layer] for layer in heads],
                         [["span", "span"], ["full", "span"], ["span", "span"], ["span", "span"]])
        dense = self.run_with("dense")
        report = self.run_with(out)
        self.assertEqual(report["cache_tokens_kept"], (7 * (16 + 47) + dense["cache_tokens_kept"]) / 8)
        self.assertLess(report["density"], 0.3)

    def test_moa(self):
        out, document = self.tune("moa", "--length", "1536", "--threads", "1", "--param", "samples=1",
                                  "--param", "response=8", "--param", "passkeys=2", "--param", "style=digits",
                                  "--param", "alpha_step=128")
        self.assertEqual([len(layer) for layer in document["parameters"]["config"]["heads"]], [2, 2, 2, 2])
        self.assertLess(self.run_with(out)["density"], 0.9)

    def test_errors(self):
        tune = ["tune", "razor", "--model", MODEL, "--out", "x.json"]
        self.refuse("tune", "rasor", saying=["unknown command 'rasor'", "did you mean 'razor'?"])
        self.refuse(*tune, "--param", "seed", saying="expected key=value")
        self.refuse(*tune, "--param", "sed=1", saying=["unknown parameter 'sed'", "did you mean 'seed'?"])
        self.refuse(*tune, "--param", "repeats=x", saying="repeats=")
        self.refuse(*tune, "--param", "seed=1", "--param", "seed=2", saying="given twice")
        self.refuse(*tune, "--length", "100000", saying=["length is 100000", "32768"])
        self.refuse(*tune, "--text", "missing.txt", saying="missing.txt")
        self.refuse(*tune[:-1], "x.txt", saying=["--out", ".json"])
        self.refuse(*tune[:-1], "missing/x.json", saying="missing/x.json")
        self.refuse("tune", "razor", "--model", "nowhere", "--out", "x.json", saying="nowhere")

    def test_interrupt_leaves_nothing(self):
        for request in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(request.name):
                self.check_interrupt(request)

    def check_interrupt(self, request):
        out = self.directory / "minference.json"
        process = subprocess.Popen([BINARY, "tune", "minference", "--model", MODEL, "--out", out, "--length", "30000"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3000):  # the file's temporary name says that the search has begun
            if any(self.directory.iterdir()):
                break
            time.sleep(0.01)
        process.send_signal(request)
        _, errors = process.communicate(timeout=240)
        self.assertEqual(process.returncode, 2, errors)
        self.assertIn("tessera: interrupted", errors)
        self.assertEqual(list(self.directory.iterdir()), [])

    def test_help_names_the_parameters(self):
        text = self.succeed("tune", "razor", "--help")
        for word in ["--param", "repeats (int, default 4)", "arXiv:2407.15891", "Example:\n  tessera tune razor"]:
            self.assertIn(word, text)


if __name__ == "__main__":
    unittest.main()

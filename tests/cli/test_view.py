"""The command view: what it says about heads, its page and its errors."""

import pathlib
import unittest

from command_line import CommandLineTest, normal_tensor, safetensors_bytes

MODEL = pathlib.Path(__file__).resolve().parents[2] / "models" / "tessera-bytes"


class ViewTest(CommandLineTest):
    def setUp(self):
        super().setUp()
        self.prompt = self.directory / "prompt.txt"
        self.prompt.write_text("The licence applies to the work. </script>" * 12)
        self.page = self.directory / "page.html"

    def test_model(self):
        summary = self.succeed_json("view", "--model", MODEL, "--prompt", self.prompt, "--methods",
                                    "dense,window:left=31,right=0", "--html", self.page)  # fmt: skip
        self.assertEqual((summary["kind"], summary["queries"], summary["cell"]), ("view", 505, 1))
        rows = summary["heads"]
        self.assertEqual([(row["layer"], row["head"]) for row in rows[::2]], [(a, b) for a in range(4) for b in range(4)])
        for dense, window in zip(rows[::2], rows[1::2]):
            self.assertEqual((dense["density"], dense["rel_l2"]), (1, 0))
            self.assertAlmostEqual(dense["mass"], 1, delta=1e-4)
            self.assertAlmostEqual(window["density"], (505 * 32 - 31 * 32 / 2) / (505 * 506 / 2), places=6)
            self.assertLessEqual(window["least_mass"], window["mass"])
            self.assertGreater(window["rel_l2"], 0)
        self.assertEqual(summary["html_bytes"], self.page.stat().st_size)
        text = self.page.read_text()
        self.assertNotIn("http://", text.split("<script>")[0])
        self.assertIn("tessera view --model", text)

    def test_choices(self):
        summary = self.succeed_json("view", "--model", MODEL, "--prompt-file", self.prompt, "--length", "300",
                                    "--methods", "dense", "--layers", "1+3", "--heads", "2-3", "--cells", "64",
                                    "--html", self.page)  # fmt: skip
        self.assertEqual([(row["layer"], row["head"]) for row in summary["heads"]], [(1, 2), (1, 3), (3, 2), (3, 3)])
        self.assertEqual((summary["queries"], summary["cell"]), (300, 8))

    def test_dumped_layers_are_those_of_the_model(self):
        dump = self.directory / "layers.safetensors"
        self.succeed("run", "--model", MODEL, "--prompt", self.prompt, "-n", "1", "--dump-qkv", dump, "--dump-layers",
                     "1+3")  # fmt: skip
        both = [
            self.succeed_json("view", *source, "--methods", "xattention:block=64", "--layers", "3", "--html", self.page)
            for source in (("--qkv", dump, "--causal"), ("--model", MODEL, "--prompt", self.prompt))
        ]
        self.assertEqual(both[0]["heads"], both[1]["heads"])
        self.assertEqual([row["layer"] for row in both[0]["heads"]], [3] * 4)

    def test_tensors_of_a_batch(self):
        path = self.directory / "qkv.safetensors"
        tensors = {name: normal_tensor(seed, (2, 2, 96, 16)) for seed, name in enumerate("qkv")}
        path.write_bytes(safetensors_bytes(tensors))
        summary = self.succeed_json("view", "--qkv", path, "--methods", "pisa:block=16,density=0.5", "--html", self.page)
        self.assertEqual([(row["layer"], row["head"]) for row in summary["heads"]], [(0, 0), (0, 1), (1, 0), (1, 1)])
        grid = self.succeed_json("view", "--qkv", path, "--grid", "6x16", "--methods", "gna:window=3x5,stride=1",
                                 "--layers", "1", "--html", self.page)  # fmt: skip
        for row in grid["heads"]:
            self.assertAlmostEqual(row["density"], 15 / 96)
        text = self.succeed("view", "--qkv", path, "--methods", "dense", "--html", self.page)
        self.assertIn("cells of 1 tokens", text)

    def test_mistakes(self):
        model = ("--model", MODEL, "--prompt", self.prompt)
        for arguments, saying in (
            ((), ["--model with --prompt, or --qkv"]),
            ((*model, "--qkv", "x"), ["either"]),
            (("--model", MODEL), ["--prompt"]),
            ((*model, "--methods", "windov"), ["did you mean 'window'?"]),
            ((*model, "--methods", "kda"), ["kda", "recurrence"]),
            ((*model, "--methods", "tidaldecode"), ["for decoding"]),
            ((*model, "--methods", "pisa"), ["causal"]),
            ((*model, "--layers", "4"), ["layer 4", "0 to 3"]),
            ((*model, "--heads", "4"), ["--heads", "0-3"]),
            ((*model, "--heads", "x"), ["--heads"]),
            ((*model, "--cells", "8"), ["--cells", "16 to 4096"]),
            ((*model, "--causal"), ["--causal"]),
            ((*model, "--grid", "8x8"), ["--grid"]),
            ((*model, "--length", "-1"), ["--length"]),
            (("--qkv", self.directory / "none"), ["none"]),
        ):
            with self.subTest(arguments):
                self.refuse("view", *arguments, "--html", self.page, saying=saying)
        self.refuse("view", *model, "--html", self.directory / "none" / "x.html", saying="none")


if __name__ == "__main__":
    unittest.main()

"""The command eval: its report, going on after an end, and its errors."""

import csv
import json
import pathlib
import unittest

from command_line import CommandLineTest

MODEL = pathlib.Path(__file__).resolve().parents[2] / "models" / "tessera-bytes"
RESULT_KEYS = ["task", "len", "method", "samples", "score", "difference", "gold_bits", "density", "decode_density", "prefill_ms",
               "decode_ms", "cache_mb", "prompt_tokens", "decode_tokens", "kept_tokens", "predicted_prefill_ms",
               "predicted_decode_ms"]  # fmt: skip


class EvalTest(CommandLineTest):
    small = ("--model", MODEL, "--lengths", "512", "--samples", "2")

    def test_report(self):
        report = self.succeed_json("eval", *self.small, "--tasks", "passkey,copy", "--methods",
                                   "dense,window:left=31,right=0")  # fmt: skip
        self.assertEqual((report["kind"], report["complete"], report["phase"]), ("eval", True, "prefill"))
        self.assertEqual([(row["task"], row["method"]) for row in report["results"]],
                         [(task, method) for task in ("passkey", "copy") for method in ("dense", "window:left=31,right=0")])
        for row in report["results"]:
            self.assertEqual(list(row), RESULT_KEYS)
            self.assertEqual((row["len"], row["samples"]), (512, 2))
            self.assertTrue(0 <= row["score"]["low"] <= row["score"]["mean"] <= row["score"]["high"] <= 1)
            self.assertEqual(row["gold_bits"] is None, row["task"] == "passkey")
            self.assertGreater(row["predicted_prefill_ms"], 0)
            self.assertGreater(row["predicted_decode_ms"], 0)
            self.assertAlmostEqual(row["kept_tokens"], row["prompt_tokens"] + row["decode_tokens"], delta=1)
        dense, window = report["results"][:2]
        self.assertEqual((dense["density"], dense["difference"]["mean"]), (1, 0))
        self.assertLess(window["density"], 0.2)
        self.assertLess(window["predicted_prefill_ms"], dense["predicted_prefill_ms"])

    def test_phases(self):
        for phase, density in (("decode", 1), ("both", None)):
            report = self.succeed_json("eval", *self.small, "--tasks", "mqar", "--methods", "streaming:n_init=4,n_local=60",
                                       "--phase", phase)  # fmt: skip
            if density:
                self.assertEqual(report["results"][0]["density"], density)
            else:
                self.assertLess(report["results"][0]["density"], 0.5)

    def test_decoding_is_counted(self):
        report = self.succeed_json("eval", *self.small, "--tasks", "mqar", "--methods",
                                   "dense,streaming:n_init=4,n_local=60,quest:budget=64,dense_layers=0", "--phase",
                                   "decode")  # fmt: skip
        dense, streaming, quest = report["results"]
        self.assertAlmostEqual(dense["decode_density"], 1)
        for row in (streaming, quest):
            self.assertEqual(row["density"], 1)
            # 64 tokens at 512 minus the answer to 512; a selection by pages may exceed its budget by one.
            self.assertTrue(64 / 512 <= row["decode_density"] <= 80 / 400, row)
            self.assertLess(row["predicted_decode_ms"], dense["predicted_decode_ms"])
        prefill = self.succeed_json("eval", *self.small, "--tasks", "mqar", "--methods", "streaming", "--phase", "prefill")
        self.assertEqual(prefill["results"][0]["decode_density"], 0)

    def test_perplexity(self):
        text = self.directory / "text.txt"
        text.write_text("The licence applies to the work. " * 100)
        report = self.succeed_json("eval", *self.small, "--tasks", "perplexity", "--text", text, "--methods", "dense")
        self.assertTrue(0.01 < report["results"][0]["score"]["mean"] < 4)

    def test_goes_on(self):
        state = self.directory / "state.jsonl"
        command = ("eval", *self.small, "--tasks", "passkey", "--methods", "dense", "--state", state)
        first = self.succeed_json(*command)
        lines = state.read_text().splitlines(keepends=True)
        self.assertEqual(len(lines), 3, "what it is about, and two results")
        # The second result was cut short; the first one is believed, whatever it says.
        changed = json.loads(lines[1])
        changed["score"] = 0.25
        state.write_text(lines[0] + json.dumps(changed) + "\n" + lines[2][:20])
        second = self.succeed_json(*command)
        expected = (0.25 + json.loads(lines[2])["score"]) / 2
        self.assertAlmostEqual(second["results"][0]["score"]["mean"], expected)
        self.assertEqual(first["results"][0]["samples"], second["results"][0]["samples"])
        self.assertEqual(len(state.read_text().splitlines()), 3)
        self.refuse(*command, "--seed", "7", saying=["holds results of", '"seed":0', '"seed":7'])
        state.write_text(lines[0] + "{}\n")
        self.refuse(*command, saying=["line 2 is no result"])

    def test_files(self):
        rows_path = self.directory / "rows.csv"
        page = self.directory / "page.html"
        report = self.succeed_json("eval", *self.small, "--tasks", "passkey,copy", "--methods",
                                   "dense,window:left=31,right=0", "--csv", rows_path, "--html", page)  # fmt: skip
        with rows_path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([(row["task"], row["method"]) for row in rows],
                         [(row["task"], row["method"]) for row in report["results"]])  # fmt: skip
        for row, result in zip(rows, report["results"]):
            self.assertEqual(float(row["score.mean"]), result["score"]["mean"])
            self.assertEqual(float(row["difference.low"]), result["difference"]["low"])
            # passkey has no code length, and comes first: the column is there all the same
            self.assertEqual(row["gold_bits"], "" if result["gold_bits"] is None else str(result["gold_bits"]))
        text = page.read_text()
        self.assertIn("window:left=31", text)
        self.assertNotIn("http://", text.split("<script>")[0])

    def test_text(self):
        text = self.succeed("eval", *self.small, "--tasks", "copy", "--methods", "dense")
        self.assertIn("copy", text)
        self.assertIn("95 %", text)

    def test_mistakes(self):
        for arguments, saying in (
            (("--tasks", "paskey"), ["did you mean 'passkey'?"]),
            (("--methods", "windov"), ["did you mean 'window'?"]),
            (("--methods", "xattention", "--phase", "decode"), ["does not support decode"]),
            (("--phase", "x"), ["prefill, decode or both"]),
            (("--tasks", "perplexity"), ["--text"]),
            (("--text", "x"), ["--text"]),
            (("--tasks", "niah-strict", "--methods", "dense"), ["task niah-strict", "do not hold"]),
            (("--kv-dtype", "u8"), ["--kv-dtype"]),
            (("--state", self.directory / "none" / "x"), ["none"]),
            (("--html", self.directory / "none" / "x.html"), ["none"]),
            (("--csv", self.directory / "none" / "x.csv"), ["none"]),
        ):
            with self.subTest(arguments):
                self.refuse("eval", *self.small, *arguments, saying=saying)
        self.refuse("eval", "--model", self.directory / "none", saying="none")


if __name__ == "__main__":
    unittest.main()

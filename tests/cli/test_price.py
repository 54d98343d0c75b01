"""The command price: formulas of Kinetics in numbers, and its errors."""

import json
import pathlib
import unittest

from command_line import CommandLineTest

MODEL = pathlib.Path(__file__).resolve().parents[2] / "models" / "tessera-bytes"


class PriceTest(CommandLineTest):
    machine = ("--gflops", "400", "--gbps", "40")

    def test_formulas(self):
        config = json.loads((MODEL / "config.json").read_text())
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        kv_heads, dim = config["num_key_value_heads"], config["head_dim"]
        context, generated, trials, budget, block = 3000, 500, 4, 256, 16
        report = self.succeed_json("price", "--model", MODEL, *self.machine, "--contexts", context, "--generated",
                                   generated, "--trials", trials, "--budgets", budget, "--block", block)  # fmt: skip
        dense, top_k, blocks = report["results"]
        # From arXiv 2506.05333, heads summed over layers; operations of the matrices are the same in all rows.
        attention = trials * 2 * (2 * context + generated) * generated * layers * heads * dim / 1e9
        reading = 2 * (2 * context + trials * generated) * generated * layers * kv_heads * dim / 1e9
        self.assertAlmostEqual(dense["gb"], reading)
        tokens = budget * generated
        self.assertAlmostEqual(dense["gflop"] - top_k["gflop"],
                               attention - trials * 4 * tokens * layers * heads * dim / 1e9)  # fmt: skip
        self.assertAlmostEqual(top_k["gb"], 4 * trials * tokens * layers * kv_heads * dim / 1e9)
        self.assertAlmostEqual(blocks["gflop"] - top_k["gflop"], attention / 2 / block)
        self.assertAlmostEqual(blocks["gb"] - top_k["gb"], reading / 2 / block)
        for row in report["results"]:
            self.assertAlmostEqual(row["effective_gflop"], row["gflop"] + 10 * row["gb"])
            self.assertAlmostEqual(row["ms"], row["effective_gflop"] / 400 * 1000)
            self.assertAlmostEqual(row["to_dense"], row["effective_gflop"] / dense["effective_gflop"])

    def test_weights_are_read_when_asked(self):
        without = self.succeed_json("price", "--model", MODEL, *self.machine, "--generated", "100")["results"][0]
        having = self.succeed_json("price", "--model", MODEL / "config.json", *self.machine, "--generated", "100",
                                   "--bytes-per-weight", "2")["results"][0]  # fmt: skip
        read = (having["gb"] - without["gb"]) * 1e9
        self.assertAlmostEqual(read / 200, round(read / 200), places=3)
        self.assertGreater(read / 200, 1e6)

    def test_table(self):
        self.assertIn("best 64 by blocks of 16", self.succeed("price", "--model", MODEL, "--budgets", "64"))

    def test_refusals(self):
        self.refuse("price", "--model", MODEL, "--block", "0", saying=["--block is 0", "positive"])
        self.refuse("price", "--model", MODEL, "--contexts", "x", saying=["--contexts"])
        self.refuse("price", "--model", MODEL, "--gbps", "-1", saying=["--gbps is -1"])
        self.refuse("price", "--model", self.directory / "none", saying=["none"])


if __name__ == "__main__":
    unittest.main()

"""The command compare: its report, its files and its errors."""

import csv
import unittest

from command_line import CommandLineTest, normal_tensor, safetensors_bytes

ROW_KEYS = ["data", "len", "seed", "method", "spec", "params", "target_density", "density", "executed_density", "flops",
            "dense_flops", "kv_bytes", "plan_ms", "kernel_ms", "dense_ms", "predicted_ms", "kinetics_ms", "simulated", "selection_share", "speed_up",
            "error", "quality"]  # fmt: skip


class CompareTest(CommandLineTest):
    small = ("--heads", "2", "--kv-heads", "1", "--dim", "32", "--lengths", "512", "--repeats", "1")

    def test_report(self):
        report = self.succeed_json("compare", "--methods", "dense,streaming:n_init=2,n_local=100,gated",
                                   "--densities", "", "--data", "blocks", *self.small)  # fmt: skip
        self.assertEqual((report["kind"], report["complete"]), ("compare", True))
        self.assertIn("--methods dense,streaming:n_init=2,n_local=100,gated", report["command"])
        self.assertEqual([row["method"] for row in report["rows"]],
                         ["dense", "streaming:n_init=2,n_local=100", "gated"])  # fmt: skip
        for row in report["rows"]:
            self.assertEqual(list(row), ROW_KEYS)
        dense, streaming, gated = report["rows"]
        self.assertEqual((dense["error"]["rel_l2"], dense["quality"]["tile_recall"]), (0, 1))
        self.assertLess(streaming["quality"]["mass"], 1)
        losses = sum(streaming["quality"][name] for name in ("budget_loss", "granularity_loss", "estimator_loss"))
        self.assertAlmostEqual(1 - streaming["quality"]["mass"], losses)
        self.assertIsNone(gated["quality"])

    def test_equal_density(self):
        report = self.succeed_json("compare", "--methods", "window,oracle-topk:unit=token", "--densities", "0.4,0.3",
                                   "--errors", "0.3", *self.small[:6], "--lengths", "2048",
                                   "--repeats", "1")  # fmt: skip
        for method in ("window", "oracle-topk:unit=token"):
            found = [row for row in report["rows"] if row["method"] == method and row["target_density"]]
            self.assertTrue(found, method)
            for row in found:
                self.assertAlmostEqual(row["executed_density"], row["target_density"], delta=0.04)
        for row in report["at_error"]:
            self.assertEqual(list(row), ["data", "len", "seed", "method", "rel_l2", "density", "speed_up"])

    def test_files(self):
        csv_path = self.directory / "rows.csv"
        page = self.directory / "page.html"
        report = self.succeed_json("compare", "--methods", "window:left=50,streaming", "--densities", "", "--csv",
                                   str(csv_path), "--html", str(page), *self.small)  # fmt: skip
        with csv_path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([row["method"] for row in rows], ["window:left=50", "streaming"])
        self.assertAlmostEqual(float(rows[0]["error.rel_l2"]), report["rows"][0]["error"]["rel_l2"])
        self.assertEqual(rows[0]["params"], '{"left":50,"right":0}')
        text = page.read_text()
        self.assertIn("window:left=50", text)
        self.assertNotIn("http://", text.split("<script>")[0])

    def test_cost_models_stand_beside_what_was_measured(self):
        report = self.succeed_json("compare", "--data", "spatial", "--lengths", "1024", "--methods",
                                   "gna:window=4x5x5,stride=1,streaming", "--densities", "", *self.small[:6],
                                   "--repeats", "1")  # fmt: skip
        gna, streaming = report["rows"]
        self.assertIsNone(streaming["simulated"])
        simulated = gna["simulated"]
        self.assertAlmostEqual(simulated["executed_density"], gna["executed_density"], delta=0.15)
        self.assertAlmostEqual(simulated["speed_up"] * simulated["executed_density"], 1)
        self.assertAlmostEqual(simulated["deviation"], simulated["executed_density"] / gna["executed_density"] - 1)
        for row in report["rows"]:
            price = row["flops"] / report["peak_gflops"] / 1e6 + row["kv_bytes"] / report["peak_gbps"] / 1e6
            self.assertAlmostEqual(row["kinetics_ms"] / price, 1)
            self.assertGreaterEqual(row["kinetics_ms"], row["predicted_ms"])

    def test_captured_tensors(self):
        path = self.directory / "qkv.safetensors"
        tensors = {name: normal_tensor(seed, (2, 2, 128, 16)) for seed, name in enumerate("qkv")}
        path.write_bytes(safetensors_bytes(tensors))
        report = self.succeed_json("compare", "--qkv", str(path), "--causal", "--methods", "window:left=31",
                                   "--densities", "", "--repeats", "1")  # fmt: skip
        self.assertEqual((report["rows"][0]["len"], report["dtype"]), (128, "f32"))
        self.assertAlmostEqual(report["rows"][0]["density"], (128 * 32 - 31 * 32 / 2) / (128 * 129 / 2))

    def test_methods_outside_their_domain_are_named(self):
        report = self.succeed_json("compare", "--methods", "pisa,window:left=9", "--densities", "", *self.small)
        self.assertEqual([row["method"] for row in report["rows"]], ["window:left=9"])
        self.assertIn("causal", report["skipped"][0]["reason"])
        text = self.succeed("compare", "--methods", "pisa,window:left=9", "--densities", "", *self.small)
        self.assertIn("left out: pisa", text)

    def test_mistakes(self):
        missing = self.directory / "missing" / "page.html"
        for arguments, saying in (
            (("--methods", "windov"), ["did you mean 'window'?"]),
            (("--data", "bloks"), ["did you mean 'blocks'?"]),
            (("--densities", "0.5,2"), ["--densities", "2"]),
            (("--densities", "x"), ["'x' is not a number"]),
            (("--lengths", "-5"), ["--lengths"]),
            (("--dtype", "u8"), ["--dtype"]),
            (("--repeats", "0"), ["--repeats"]),
            (("--html", str(missing)), [str(missing)]),
            (("--qkv", str(missing)), [str(missing)]),
        ):
            with self.subTest(arguments):
                self.refuse("compare", *arguments, saying=saying)


if __name__ == "__main__":
    unittest.main()

"""The command line as a whole: names, help, errors; and the commands methods and bench."""

import json

from command_line import CommandLineTest

METHODS = {"dense", "window", "streaming", "oracle-topk", "xattention", "minference"}
SPREAD = ["min", "median", "max"]
BENCH_KEYS = [
    "method",
    "params",
    "isa",
    "threads",
    "dtype",
    "density",
    "plan_ms",
    "kernel_ms",
    "gflops",
    "peak_gflops",
    "fraction_of_peak",
    "dense_ms",
    "ratio_to_dense",
    "gbps",
    "peak_gbps",
    "fraction_of_bandwidth",
]


class NamesTest(CommandLineTest):
    def test_unknown_command(self):
        self.refuse("atend", saying=["unknown command 'atend'", "did you mean 'attend'?"])
        self.refuse("bench", "atention", saying=["unknown command 'atention'", "did you mean 'attention'?"])

    def test_command_is_required(self):
        self.refuse(saying="--help")
        self.refuse("bench", saying="--help")

    def test_unknown_option(self):
        self.refuse("attend", "--qvk", "x", saying=["unknown option '--qvk'", "did you mean '--qkv'?"])
        self.refuse("methods", "--jsn", saying=["unknown option '--jsn'", "did you mean '--json'?"])
        self.refuse("--jsn", saying="unknown option '--jsn'")

    def test_surplus_argument(self):
        self.refuse("bench", "peak", "now", saying="now")

    def test_option_without_value(self):
        self.refuse("attend", "--qkv", saying="--qkv")

    def test_help_has_an_example(self):
        for words in ([], ["methods"], ["attend"], ["bench"], ["bench", "attention"], ["bench", "peak"]):
            with self.subTest(words):
                text = self.succeed(*words, "--help")
                self.assertIn("Example:\n  tessera ", text)
                self.assertIn(" ".join(["tessera", *words]), text)

    def test_version(self):
        self.assertRegex(self.succeed("--version"), r"^\d+\.\d+\.\d+\n$")


class MethodsTest(CommandLineTest):
    def test_list(self):
        listed = self.succeed_json("methods")
        self.assertLessEqual(METHODS, {method["name"] for method in listed})
        for method in listed:
            keys = ["name", "family", "summary", "paper", "phases", "parameters", "side_inputs", "has_plan", "own_cache"]
            self.assertEqual(list(method), keys)
            self.assertLessEqual(set(method["phases"]), {"prefill", "decode", "backward"})
            self.assertTrue(method["phases"])
            for parameter in method["parameters"]:
                self.assertLessEqual({"name", "type", "default", "description"}, set(parameter))
                self.assertTrue(parameter["description"])
        own_cache = {method["name"]: method["own_cache"] for method in listed}
        self.assertIs(own_cache["snapkv"], True)
        self.assertIs(own_cache["quest"], False)
        text = self.succeed("methods")
        for name in METHODS:
            self.assertIn(name, text)

    def test_one(self):
        window = self.succeed_json("methods", "window")
        self.assertEqual(window["name"], "window")
        self.assertIn("left", [parameter["name"] for parameter in window["parameters"]])
        self.assertIn("left=", self.succeed("methods", "window"))

    def test_markdown(self):
        text = self.succeed("methods", "--markdown")
        for name in METHODS:
            self.assertIn(name, text)

    def test_unknown(self):
        self.refuse("methods", "windov", saying=["'windov'", "did you mean 'window'?"])


class BenchTest(CommandLineTest):
    small = ("--len", "256", "--heads", "2", "--kv-heads", "1", "--dim", "32", "--repeats", "1")

    def check(self, *arguments):
        result = self.succeed_json("bench", "attention", *self.small, *arguments)
        self.assertEqual(list(result)[: len(BENCH_KEYS)], BENCH_KEYS)
        for key in ("plan_ms", "kernel_ms", "dense_ms"):
            self.assertEqual(list(result[key]), SPREAD)
            self.assertLessEqual(result[key]["min"], result[key]["median"])
            self.assertLessEqual(result[key]["median"], result[key]["max"])
        for key in ("gflops", "peak_gflops", "gbps", "peak_gbps", "ratio_to_dense"):
            self.assertGreater(result[key], 0, key)
        self.assertTrue(0 < result["density"] <= 1)
        return result

    def test_method(self):
        result = self.check("--method", "window:left=31", "--causal", "--dtype", "bf16")
        self.assertEqual((result["method"], result["dtype"]), ("window", "bf16"))
        self.assertEqual(result["params"]["left"], 31)
        self.assertAlmostEqual(result["density"], (256 * 32 - 31 * 32 / 2) / (256 * 257 / 2))
        self.assertEqual(list(result["error"]), ["rel_l2", "max_abs", "softmax_mass"])
        self.assertGreater(result["error"]["rel_l2"], 0.05)
        self.assertTrue(0.1 < result["error"]["softmax_mass"] < 0.9)

    def test_dense(self):
        result = self.check("--method", "dense", "--data", "randn")
        self.assertEqual(result["density"], 1)
        self.assertEqual(result["error"], {"rel_l2": 0, "max_abs": 0, "softmax_mass": 1})

    def test_random_block(self):
        result = self.check("--plan", "random-block:tile=32,density=0.25", "--causal")
        self.assertEqual(result["params"]["tile"], 32)
        self.assertAlmostEqual(result["density"], 0.25, delta=0.15)

    def test_random_token(self):
        result = self.check("--plan", "random-token:tile=32,density=0.25")
        self.assertAlmostEqual(result["density"], 0.25, delta=0.01)

    def test_per_query(self):
        result = self.check("--plan", "per-query:blocks=2,block=16", "--causal")
        self.assertLess(result["density"], 0.5)

    def test_window_plan(self):
        result = self.check("--plan", "window:size=32,tile=32", "--causal")
        self.assertAlmostEqual(result["density"], (256 * 32 - 31 * 32 / 2) / (256 * 257 / 2))

    def test_decode(self):
        result = self.check("--phase", "decode", "--plan", "random-token:keys=64")
        self.assertEqual(result["density"], 0.25)
        self.check("--phase", "decode", "--plan", "dense")

    def test_backward(self):
        for arguments in (("--method", "dense"), ("--method", "nsa:top_k=2,window=16"), ("--plan", "dense")):
            result = self.check("--phase", "backward", "--causal", "--dtype", "bf16", *arguments)
            self.assertEqual(list(result)[-2:], ["forward_ms", "forward_fraction_of_peak"])
            self.assertGreater(result["forward_fraction_of_peak"], 0)
        text = self.succeed("bench", "attention", *self.small, "--method", "moba", "--phase", "backward", "--causal")
        self.assertIn("of that fraction", text)

    def test_side_inputs(self):
        given = ("--side", "projection,bias")
        with_side = self.check("--method", "sla", *given)
        self.assertEqual(with_side["side"], ["projection", "bias"])
        without = self.check("--method", "sla")
        self.assertNotIn("side", without)
        # The linear branch changes the output.
        self.assertNotAlmostEqual(with_side["error"]["rel_l2"], without["error"]["rel_l2"], delta=0.01)
        result = self.check("--phase", "backward", "--method", "sla", *given)
        self.assertEqual(result["side"], ["projection", "bias"])
        text = self.succeed("bench", "attention", *self.small, "--method", "sla", *given)
        self.assertIn('with ["projection","bias"]', text)

    def test_recurrence(self):
        for method in ("lightning2", "gated-deltanet", "kda"):
            for phase in (("--causal",), ("--phase", "decode")):
                result = self.succeed_json("bench", "attention", *self.small, "--method", method, *phase)
                self.assertEqual(list(result)[: len(BENCH_KEYS)], BENCH_KEYS)
                self.assertEqual(result["density"], 0)
                self.assertNotIn("error", result)
                for key in ("gflops", "tokens_per_second", "ratio_to_dense"):
                    self.assertGreater(result[key], 0, (method, key))

    def test_data_kinds(self):
        self.check("--method", "streaming", "--data", "heads-llm", "--causal")

    def test_text(self):
        text = self.succeed("bench", "attention", *self.small, "--plan", "dense")
        self.assertIn("of the peak", text)

    def test_peak(self):
        result = self.succeed_json("bench", "peak")
        self.assertEqual(
            list(result), ["threads", "default_isa", "peaks", "read_gbps_one_thread", "read_gbps"]
        )
        self.assertIn("portable", [peak["isa"] for peak in result["peaks"]])
        for peak in result["peaks"]:
            self.assertEqual(list(peak), ["isa", "compute", "gflops_one_thread", "gflops"])
            self.assertGreater(peak["gflops"], 0)

    def test_bad_input(self):
        def refuse(*arguments, saying):
            self.refuse("bench", "attention", *arguments, saying=saying)

        refuse("--len", "256", saying="--method")
        refuse("--len", "256", "--method", "dense", "--plan", "dense", saying="--plan")
        refuse("--plan", "dense", saying="--len")
        small = ("--len", "256", "--plan")
        refuse(*small, "random-blck", saying=["unknown plan 'random-blck'", "did you mean 'random-block'?"])
        refuse(*small, "random-block:tle=3", saying=["'tle'", "did you mean 'tile'?"])
        refuse(*small, "random-block:density=1.5", saying=["density", "1.5"])
        refuse(*small, "random-block:density=nan", saying=["density", "nan"])
        refuse(*small, "random-block:tile=0", saying=["tile", "0"])
        refuse(*small, "random-block:tile=1.5", saying=["tile", "1.5"])
        refuse(*small, "random-block:tile", saying="tile")
        refuse(*small, "dense:tile=3", saying="no parameters")
        refuse(*small, "dense", "--heads", "6", "--kv-heads", "4", saying=["6", "4"])
        refuse(*small, "dense", "--heads", "-1", saying=["--heads", "-1"])
        refuse(*small, "dense", "--dtype", "int3", saying="int3")
        refuse(*small, "dense", "--dtype", "u8", saying="u8")
        refuse(*small, "dense", "--phase", "backwards", saying="backwards")
        refuse(*small, "dense", "--repeats", "0", saying="--repeats")
        refuse(*small, "dense", "--data", "heads-lm", saying=["'heads-lm'", "heads-llm"])
        refuse("--len", "0", "--plan", "dense", saying="--len")
        refuse("--len", "256", "--method", "sla", "--side", "projektion", saying=["projektion", "projection, bias"])
        refuse("--len", "256", "--method", "dense", "--side", "bias", saying=["bias", "expected none"])
        refuse(*small, "dense", "--side", "bias", saying="--side")
        refuse("--len", "256", "--method", "xattention", "--phase", "decode", saying=["xattention", "decode"])


class SimulateTest(CommandLineTest):
    def test_paper_grid(self):
        # The grid, window and stride of the paper's HunyuanVideo example: 91% of the pairs are left out.
        report = self.succeed_json("simulate", "--tile-q", "4x4x8", "--tile-k", "2x8x8", "--attention-share", "0.5",
                                   "--strides")  # fmt: skip
        self.assertAlmostEqual(report["flop_speedup"], 30 * 48 * 80 / (18 * 24 * 24))
        self.assertEqual(report["dense_tiles"], 15 * 6 * 10)
        self.assertLessEqual(report["speedup"], report["mean_speedup"])
        self.assertLessEqual(report["speedup"], report["flop_speedup"])
        self.assertAlmostEqual(report["end_to_end_speedup"], 1 / (0.5 + 0.5 / report["speedup"]))
        for axis in report["strides"]:
            visited = [option["most_visited"] for option in axis]
            self.assertEqual(axis[0]["stride"], 1)
            self.assertEqual(visited, sorted(set(visited), reverse=True))
        # With the tiles that are chosen it reaches what arithmetic allows, as the paper measured.
        chosen = self.succeed_json("simulate")
        self.assertTrue(chosen["block_sparse"])
        self.assertAlmostEqual(chosen["speedup"], chosen["flop_speedup"])
        self.assertIn("strides over columns", self.succeed("simulate", "--strides"))

    def test_whole_window_is_dense(self):
        report = self.succeed_json("simulate", "--grid", "4x8x8", "--window", "0", "--stride", "1")
        self.assertEqual((report["speedup"], report["flop_speedup"]), (1, 1))
        self.assertTrue(report["block_sparse"])

    def test_refusals(self):
        self.refuse("simulate", "--grid", "4x", saying=["grid"])
        self.refuse("simulate", "--window", "4", "--stride", "5", saying=["stride is '5'"])
        self.refuse("simulate", "--tile-q", "16x16", saying=["at most 128 tokens"])
        self.refuse("simulate", "--grid", "99999x2x2", saying=["at most 65536 on an axis"])
        self.refuse("simulate", "--attention-share", "2", saying=["--attention-share is 2"])
        self.refuse("simulate", "--tiling", "none", saying=["none"])

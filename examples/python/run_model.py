"""The runner: a small model that comes with the repository, read from its folder; methods side by side."""

import pathlib
import sys

import tessera

folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parents[2] / "models" / "tessera-bytes"
model = tessera.Model.load(folder)
print(model)

prompt = "The pass key is 48213. Remember it. " + "The grass is green. The sky is blue. " * 60 + "The pass key is"
for method in ("dense", "streaming:n_init=64,n_local=256", "xattention"):
    result = model.generate(prompt, 8, method=method)
    print(f"{method:<32} density {result.statistics['density']:.2f}: {result.text!r}")

print("streamed:", end="", flush=True)
for piece in model.stream(prompt, 24, method="xattention"):
    print(piece, end="", flush=True)
print()

for row in model.evaluate(["passkey"], [512], ["dense", "streaming:n_init=16,n_local=64"], samples=2):
    print(f"{row.task} at {row.length} tokens, {row.method}: {row.score.mean:.2f}")

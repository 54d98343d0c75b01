"""Plans as values: views of their arrays, set operations, a picture, a file."""

import pathlib
import tempfile

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

import tessera  # noqa: E402

rng = np.random.default_rng(0)
q, k = (rng.standard_normal((1, 2, 1024, 64)).astype(np.float32) for _ in range(2))

window = tessera.plan(q, k, method="window", left=255, causal=True)
sinks = tessera.plan(q, k, method="streaming", n_init=64, n_local=64, causal=True)
both = window | sinks  # union; & is the intersection, ~ the complement
print(f"densities: window {window.density:.3f}, sinks {sinks.density:.3f}, both {both.density:.3f}")
print("the window covers", f"{window.coverage(sinks):.0%} of the pairs with sinks")

# The arrays are views, without a copy: an entry names keys and how they are masked.
print(len(both.entries), "entries, first:", dict(zip(tessera.ENTRY.names, both.entries[0].tolist())))

# Any boolean mask is a plan too; it is exact, and as fast as its tiles allow.
mask = rng.random((1024, 1024)) < 0.1
mask &= np.tri(1024, dtype=bool)
random = tessera.Plan.from_mask(both.problem, mask, tile_q=64, tile_k=64)
assert (random.to_mask() == mask).all()

with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "both.plan"
    both.save(path)
    assert tessera.Plan.load(path) == both

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5))
    for ax, plan, name in zip(axes, (window, both, random), ("window", "window | sinks", "a mask")):
        plan.plot(ax=ax)
        ax.set_title(f"{name}: {plan.density:.1%}")
    figure.savefig(pathlib.Path(folder) / "plans.png", dpi=80)
    print("picture of", (pathlib.Path(folder) / "plans.png").stat().st_size, "bytes")

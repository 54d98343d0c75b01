"""Attention on NumPy arrays: choose a method, look at what it computed, run a plan again."""

import numpy as np

import tessera

rng = np.random.default_rng(0)
q = rng.standard_normal((1, 8, 2048, 64)).astype(np.float32)  # batch, query heads, tokens, head dim
k = rng.standard_normal((1, 2, 2048, 64)).astype(np.float32)  # each key head serves four query heads
v = rng.standard_normal((1, 2, 2048, 64)).astype(np.float32)

# Dense attention, and the same with a method from the literature.
dense = tessera.attention(q, k, v, causal=True)
sparse, plan = tessera.attention(q, k, v, "streaming", n_init=64, n_local=512, causal=True, return_plan=True)
print(plan.explain())
print("relative difference to dense:", np.linalg.norm(sparse - dense) / np.linalg.norm(dense))

# A plan can be kept and run again, with the log-sum-exp of each row.
o, lse = tessera.run(plan, q, k, v, return_lse=True)
assert (o == sparse).all()

# What is known about a method.
info = tessera.methods()["xattention"]
print(info.summary, "-", info.paper)
for parameter in info.parameters:
    print(f"  {parameter.name} = {parameter.default}: {parameter.description}")

# Mistakes are named.
try:
    tessera.attention(q, k, v, "xattention", tau=1.5)
except tessera.Error as error:
    print("Error:", error)

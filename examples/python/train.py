"""Training through sparse attention: NSA with learned compression and gates, on copying what came before."""

import torch

from tessera.torch import NSA

torch.manual_seed(0)
HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 32, 64


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(WIDTH, HEADS * DIM)
        self.k = torch.nn.Linear(WIDTH, KV_HEADS * DIM)
        self.v = torch.nn.Linear(WIDTH, KV_HEADS * DIM)
        self.attention = NSA(WIDTH, HEADS, KV_HEADS, DIM, length=16, stride=8, block_size=16, top_k=4, window=32)
        self.out = torch.nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(self.attention(x, q, k, v).transpose(1, 2).flatten(2))


layer = Layer()
optimiser = torch.optim.AdamW(layer.parameters(), lr=3e-3)
x = torch.randn(2, 256, WIDTH)
target = torch.cat([torch.zeros(2, 1, WIDTH), x[:, :-1]], dim=1)  # the token before
for step in range(60):
    loss = torch.nn.functional.mse_loss(layer(x), target)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    if step % 20 == 0 or step == 59:
        print(f"step {step}: loss {loss.item():.3f}")
assert loss.item() < 0.8

"""A video transformer of Diffusers with sparse attention on its token grid; small, with random weights."""

import diffusers
import torch

from tessera.integrations import diffusers as integration

torch.manual_seed(0)
model = diffusers.WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=48, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64,
    num_layers=2, patch_size=(1, 2, 2), rope_max_seq_len=64,
).eval()  # fmt: skip
latents, text, step = torch.randn(1, 4, 5, 32, 32), torch.randn(1, 9, 16), torch.tensor([500])
grid = integration.grid_of(model, latents.shape)
print(f"{grid.tokens} tokens on a grid of {grid.extent}")
with torch.no_grad():
    expected = model(latents, step, text, return_dict=False)[0]
    for method in ("dense", "gna:window=3x9x9,stride=1x1x1", "sla", "draft"):
        with integration.attention(method, grid=grid) as use:
            found = model(latents, step, text, return_dict=False)[0]
        error = ((found - expected).norm() / expected.norm()).item()
        print(f"{method:<34} {use.calls} self-attentions, {use.others} to the text, relative difference {error:.2e}")

"""A model of Transformers with sparse prefill and sparse decoding; random weights, so that nothing is downloaded."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tessera.integrations import transformers as integration

integration.register()  # every method: "tessera_xattention", "tessera_streaming", ...

# A method with parameters for prefill, another one for decoding; the first layer stays dense.
integration.register_as(
    "tessera_long",
    {"0": "dense", "1-": "xattention:tau=0.9"},
    decode={"0": "dense", "1-": "quest:budget=256"},
)

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096,
)  # fmt: skip
# From a checkpoint: AutoModelForCausalLM.from_pretrained(folder, attn_implementation="tessera_long")
model = AutoModelForCausalLM.from_config(config, attn_implementation="tessera_long").eval()
prompt = torch.randint(3, 300, (1, 1000))
tokens = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
print("sparse:", tokens[0, 1000:].tolist())

model.set_attn_implementation("tessera_dense")  # any implementation, at any time
tokens = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
print("dense: ", tokens[0, 1000:].tolist())

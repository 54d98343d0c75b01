# SPDX-License-Identifier: Apache-2.0
"""Write the model in the layout of Hugging Face: config, weights, tokenizer, generation defaults."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import BOS, EOS, Llama, ModelConfig


def byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte value (the table of GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {b: chr(b) for b in printable}
    spare = 256
    for b in range(256):
        if b not in characters:
            characters[b] = chr(spare)
            spare += 1
    return [characters[b] for b in range(256)]


def tokenizer() -> dict[str, object]:
    """A byte-level BPE without merges: the id of a byte is its value."""
    special = [{"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for i, c in ((BOS, "<bos>"), (EOS, "<eos>"))]
    vocab = {c: i for i, c in enumerate(byte_characters())} | {"<bos>": BOS, "<eos>": EOS}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    first = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [first, sequence],
                "pair": [first, sequence, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}}}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": template, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": vocab, "merges": []}}


def config(c: ModelConfig) -> dict[str, object]:
    """config.json."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(c), "attention_bias": False,
            "attention_dropout": 0.0, "mlp_bias": False, "hidden_act": "silu", "initializer_range": 0.02,
            "rope_scaling": None, "tie_word_embeddings": True, "bos_token_id": BOS, "eos_token_id": EOS,
            "pretraining_tp": 1, "torch_dtype": "bfloat16", "use_cache": True}


def export(model: Llama, folder: Path) -> None:
    """Write the folder; the head is tied, so the embedding stands in for it."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, value: object) -> None:
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    write("config.json", config(model.config))
    write("generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False})
    write("tokenizer.json", tokenizer())
    write("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>",
                                    "eos_token": "<eos>", "add_bos_token": True, "clean_up_tokenization_spaces": False,
                                    "model_max_length": model.config.max_position_embeddings})
    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    """Export a checkpoint of a run."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=here.parent / "models" / "tessera-bytes")
    arguments = parser.parse_args()
    model = Llama(ModelConfig())
    model.load_state_dict(torch.load(arguments.checkpoint)["model"])
    export(model, arguments.out)


if __name__ == "__main__":
    main()

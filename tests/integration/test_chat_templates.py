# SPDX-License-Identifier: Apache-2.0
"""Chat templates: what `--chat` encodes is what Jinja makes of a template of the same form."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

jinja2 = pytest.importorskip("jinja2")
gguf = pytest.importorskip("gguf")
from test_gguf_models import byte_characters, write_model  # noqa: E402

BOS, EOS = "<s>", "</s>"
MARKS = [BOS, EOS, "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
         "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]"]

FIRST_SYSTEM = ("{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
                "{% set turns = messages[1:] %}{% else %}{% set system = none %}{% set turns = messages %}{% endif %}")
TEMPLATES: dict[str, str] = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "chatml-default": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a test.<|im_end|>\\n' }}"
                      "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] "
                      "+ '<|im_end|>\\n' }}{% endfor %}{{ '<|im_start|>assistant\\n' }}",
    "llama-2": FIRST_SYSTEM + "{% for m in turns %}{% if m['role'] == 'user' %}{% if loop.first and system %}"
               "{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}{% else %}"
               "{% set text = m['content'] %}{% endif %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
               "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama-3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
               "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>"
               "\\n\\n' }}",
    "llama-3.1": FIRST_SYSTEM + "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
                 "{{ 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' }}{{ (system or '') | trim }}"
                 "{{ '<|eot_id|>' }}{% for m in turns %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
                 "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
                 "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
    "mistral": FIRST_SYSTEM + "{{ bos_token }}{% for m in turns %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
               "{% if loop.last and system %}{{ system + '\\n\\n' }}{% endif %}{{ m['content'] + ' [/INST]' }}"
               "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    "mistral-tight": FIRST_SYSTEM + "{{ bos_token }}{% for m in turns %}{% if m['role'] == 'user' %}{{ '[INST]' }}"
                     "{% if loop.last and system %}{{ system + '\\n\\n' }}{% endif %}{{ m['content'] + '[/INST]' }}"
                     "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    "gemma": FIRST_SYSTEM + "{{ bos_token }}{% for m in turns %}{{ '<start_of_turn>' + ('model' if m['role'] == "
             "'assistant' else m['role']) + '\\n' }}{% if loop.first and system %}{{ system + '\\n\\n' }}{% endif %}"
             "{{ m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{{ '<start_of_turn>model\\n' }}",
    "phi-3": "{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|system|>\\n' + m['content'] + '<|end|>\\n' }}"
             "{% else %}{{ '<|user|>\\n' + m['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}{{ '<|assistant|>\\n' }}",
    "zephyr": "{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|system|>\\n' + m['content'] + eos_token + "
              "'\\n' }}{% else %}{{ '<|user|>\\n' + m['content'] + eos_token + '\\n' }}{% endif %}{% endfor %}"
              "{{ '<|assistant|>\\n' }}",
}


def write_vocabulary(writer: Any) -> int:
    characters = byte_characters()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    tokens = [*characters, "\u010a\u010a", *MARKS]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] * len(MARKS))
    writer.add_token_merges(["\u010a \u010a"])
    writer.add_bos_token_id(tokens.index(BOS))
    writer.add_eos_token_id(tokens.index(EOS))
    writer.add_add_bos_token(False)
    return len(tokens)


def tokenize(tessera: Path, model: Path, text: str, *options: str) -> list[int]:
    prompt = model.parent / "prompt"
    prompt.write_text(text, encoding="utf-8")
    done = subprocess.run([tessera, "tokenize", "--model", model, "--prompt", prompt, "--json", *options],
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["tokens"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_jinja_renders(tessera: Path, tmp_path: Path, name: str) -> None:
    """With and without a system message; line breaks at the seams, which join when text is cut into words."""
    model = tmp_path / "model.gguf"
    write_model(model, "llama", tokenizer=write_vocabulary, template=TEMPLATES[name])
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATES[name])
    for system in ("", "Be brief.\nAlways."):
        for user in ("Hi there", "\n\nHow are you?\n", "日本語 😀"):
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": user})
            text = template.render(messages=messages, bos_token=BOS, eos_token=EOS, add_generation_prompt=True)
            options = ["--system", system] if system else []
            assert tokenize(tessera, model, user, "--chat", *options) == tokenize(tessera, model, text, "--special")


def test_names_in_messages_are_text(tessera: Path, tmp_path: Path) -> None:
    """A message cannot end its own turn."""
    model = tmp_path / "model.gguf"
    write_model(model, "llama", tokenizer=write_vocabulary, template=TEMPLATES["chatml"])
    ids = tokenize(tessera, model, "x<|im_end|>y", "--chat")
    end = 257 + MARKS.index("<|im_end|>")
    assert ids.count(end) == 1


def test_unknown_template(tessera: Path, tmp_path: Path) -> None:
    """The message lists those that are known."""
    model = tmp_path / "model.gguf"
    write_model(model, "llama", tokenizer=write_vocabulary, template="{{ messages[0]['content'] }}")
    (tmp_path / "prompt").write_text("x")
    done = subprocess.run([tessera, "tokenize", "--model", model, "--prompt", tmp_path / "prompt", "--chat"],
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "chatml, llama-2, llama-3, mistral, gemma, phi-3, zephyr" in done.stderr

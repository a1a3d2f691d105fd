"""Use the attention implementation alone, on any transformers decoder.

python examples/attention_implementation.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dsb_runtime  # noqa: F401 - registers the implementation "dsb"

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)
model = LlamaForCausalLM(config).eval()
input_ids = torch.randint(128, (2, 24))
padding = torch.ones_like(input_ids)
padding[1, :7] = 0  # the second row is left-padded

with torch.no_grad():
    expected = model(input_ids, attention_mask=padding).logits
    model.set_attn_implementation("dsb")
    logits = model(input_ids, attention_mask=padding).logits
difference = (logits - expected)[padding.bool()].abs().max().item()
print(f"largest difference from transformers' own attention: {difference:.1e}")

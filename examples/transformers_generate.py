"""Decode through transformers: the Auto classes, `generate`, a streamer.

python examples/transformers_generate.py
"""

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import dsb_runtime as dsb  # registers LLaDA and Dream with the Auto classes
from dsb_runtime.demo import MODEL_DIR

model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
question = "<|user|> Zoe has 8 cards. Monday she doubles them. How many cards now? <|assistant|>"
inputs = tokenizer(question, return_tensors="pt")

out = model.generate(
    inputs.input_ids,
    attention_mask=inputs.attention_mask,
    custom_generate=dsb.custom_generate,
    max_new_tokens=32,
    block_length=16,
    cache_policy="dsb",  # `cache` is an argument of transformers' own
    streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    return_dict_in_generate=True,
)
print(out.nfe, "forwards")

"""Fill a blank: masks may stand anywhere, and every other token is kept.

python examples/infill.py
"""

import torch

import dsb_runtime as dsb
from dsb_runtime.demo import MODEL_DIR

model = dsb.load_model(MODEL_DIR)
tokenizer = dsb.load_tokenizer(MODEL_DIR)
question = "<|user|> Zoe has 39 coins. Monday she drops 1. Tuesday she halves them."
before = tokenizer(question + " How many coins now? <|assistant|> Monday").input_ids
after = tokenizer("Answer 19.").input_ids

mask = [model.dsb.mask_id]
input_ids = torch.tensor([before + 13 * mask + after])
print(tokenizer.decode(input_ids[0, len(before) - 1 :]))

out = dsb.infill(model, input_ids)
print(tokenizer.decode(out.sequences[0, len(before) - 1 :]))
print(out.nfe, "forwards for", out.row_tokens[0], "masks")

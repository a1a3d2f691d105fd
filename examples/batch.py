"""Decode prompts of different length in one batch, left-padded.

    python examples/batch.py

Every row has its own window, counters and end, and gets the tokens that it gets alone.
"""

import dsb_runtime as dsb
from dsb_runtime.demo import MODEL_DIR

model = dsb.load_model(MODEL_DIR)
tokenizer = dsb.load_tokenizer(MODEL_DIR)
questions = [
    "Ana has 20 pens. Monday she buys 3. How many pens now?",
    "Leo has 12 coins. Monday he wins 10. Tuesday he sleeps in. Wednesday he drops 2. "
    "How many coins now?",
]
chats = [f"<|user|> {question} <|assistant|>" for question in questions]
batch = tokenizer(chats, padding=True, padding_side="left", return_tensors="pt")
out = dsb.generate(model, batch.input_ids, attention_mask=batch.attention_mask, gen_length=64)

answers = tokenizer.batch_decode(out.sequences[:, -64:], skip_special_tokens=True)
for answer, tokens, forwards in zip(answers, out.row_tokens, out.row_nfe, strict=True):
    print(f"{answer} ({tokens} tokens, {forwards} forwards)")

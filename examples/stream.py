"""Watch a decoding: `on_step` is called after every forward with what it committed.

python examples/stream.py
"""

import dsb_runtime as dsb
from dsb_runtime.demo import MODEL_DIR

model = dsb.load_model(MODEL_DIR)
tokenizer = dsb.load_tokenizer(MODEL_DIR)
question = "<|user|> Tom has 40 books. Monday he loses 4. Tuesday he buys 9. How many books now?"
input_ids = tokenizer(question + " <|assistant|>", return_tensors="pt").input_ids
prompt = input_ids.shape[1]


def show(event: dsb.StepEvent) -> None:
    """Print the canvas so far. Tokens are committed in any order, so there are gaps."""
    response = event.canvas[0, prompt : prompt + 18].tolist()
    words = ["__" if token == model.dsb.mask_id else tokenizer.decode(token) for token in response]
    print(f"forward {event.index:2} ({event.kind}):", " ".join(words))


# A high threshold commits little at a time, so that there is something to watch.
out = dsb.generate(model, input_ids, gen_length=32, block_length=8, threshold=0.999, on_step=show)
print(out.nfe, "forwards")

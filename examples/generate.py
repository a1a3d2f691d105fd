"""Answer one prompt.

    python examples/generate.py

The embedded model solves arithmetic word problems, offline. Any LLaDA or Dream checkpoint, a folder
or a hub id, takes its place.
"""

import dsb_runtime as dsb
from dsb_runtime.demo import MODEL_DIR

model = dsb.load_model(MODEL_DIR)
tokenizer = dsb.load_tokenizer(MODEL_DIR)

question = "Mia has 12 apples. Monday she finds 7. Tuesday she loses 5. How many apples now?"
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
out = dsb.generate(model, prompt.input_ids, gen_length=64)

answer = out.sequences[0, prompt.input_ids.shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
print(out.nfe, "forwards for", out.row_tokens[0], "tokens")

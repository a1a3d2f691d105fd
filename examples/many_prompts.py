"""Decode many prompts side by side: a row that is done takes the next prompt.

    python examples/many_prompts.py

Prompts are read as rows get free. Each gets the tokens that it gets alone.
"""

import dsb_runtime as dsb
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.demo.problems import heldout

model = dsb.load_model(MODEL_DIR)
tokenizer = dsb.load_tokenizer(MODEL_DIR)


def encode(question):
    return tokenizer(f"<|user|> {question} <|assistant|>").input_ids


questions = [problem.prompt for problem in heldout(10)]
outs = dsb.generate_batch(model, map(encode, questions), max_rows=4, gen_length=64)
for index, out in outs:  # in the order in which they are done
    answer = tokenizer.decode(out.sequences[0, -64:], skip_special_tokens=True)
    print(f"{index}: {answer} ({out.nfe} forwards)")

# Requests with settings of their own, from any thread, and answers that are followed as they grow.
engine = dsb.BatchEngine(model, max_rows=4)
others = [engine.submit(encode(q), gen_length=64, threshold=0.8) for q in questions[1:4]]
first = engine.submit(encode(questions[0]), gen_length=64, steps=64)
for ids in first:
    print(tokenizer.decode(ids), end=" ", flush=True)
print("|", sum(request.result().row_tokens[0] for request in others), "tokens beside it")

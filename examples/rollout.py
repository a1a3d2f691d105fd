"""A rollout in a training loop: samples, and what a policy gradient needs of them.

    python examples/rollout.py

`record=True` returns when each token was committed and with which log-probability. The optimizer
changes the weights in place, and the next call decodes with them.
"""

import torch

import dsb_runtime as dsb
from dsb_runtime.demo import MODEL_DIR, problems

model = dsb.load_model(MODEL_DIR)
tokenizer = dsb.load_tokenizer(MODEL_DIR)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
items = [problems.problem(seed, "train", steps=2) for seed in range(2)]
texts = [f"<|user|> {item.prompt} <|assistant|>" for item in items]
prompts = tokenizer(texts, return_tensors="pt").input_ids  # of one length: all have two steps

for number in range(2):
    out = dsb.generate(
        model, prompts, gen_length=20, cache="none", temperature=3.0, num_return_sequences=4,
        record=True, generator=torch.Generator().manual_seed(number),
    )  # fmt: skip
    response = out.sequences[:, prompts.shape[1] :]
    answers = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in response]
    reward = torch.tensor([float(a == items[i // 4].response) for i, a in enumerate(answers)])
    advantage = (reward.view(-1, 4) - reward.view(-1, 4).mean(1, keepdim=True)).view(-1, 1)

    # Each forward of the decoding again, with gradients: the canvas as it was before its commits.
    loss, worst = torch.zeros(()), 0.0
    for step in range(int(out.step_map.max()) + 1):
        canvas = out.sequences.clone()
        canvas[:, prompts.shape[1] :][out.step_map >= step] = model.dsb.mask_id
        logprobs = model(canvas).logits[:, prompts.shape[1] :].log_softmax(-1)
        now = out.step_map == step
        ratio = (logprobs.gather(2, response[..., None])[..., 0] - out.logprobs).exp()
        loss -= (ratio * advantage)[now].sum() / len(response)
        worst = max(worst, float((ratio[now].detach() - 1).abs().max()))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"round {number}: {int(reward.sum())} of 8 right, ratio within {worst:.4f} of 1")

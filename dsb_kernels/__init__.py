"""Kernels of diffusion-language-model decoding: tensors in, tensors out, no model.

`dsb_kernels.method` says in plain Python what they compute together. An op's module holds its
definition in plain PyTorch (which is what a CPU runs), its Triton kernel and its checks.

    place             place_rows: which rows take part in a step, and where their windows stand
    rope_kv           rope_write_kv: rotate a window's queries and keys, write K/V into the cache
    attention         window_attention: a window attends to the cache, or to listed KV blocks of it
    block_lists       blocks_near_window and others: lists of KV blocks for window_attention
    linear            window_linear: a linear layer, or a gated one, for the tokens of a window
                      linear_add_norm: a linear layer, the residual and the next RMS norm
    lm_head           lm_head_confidence: from hidden states to a proposed token and its confidence
                      lm_head_partial: the same for a shard of the vocabulary, up to a state
    score             combine_partials: from the states of all shards to token and confidence
    token_confidence  token_confidence: from logits to a proposed token and its confidence
    commit            unmask_and_slide: commit the best candidates and slide the block
"""

__version__ = "0.2.0"

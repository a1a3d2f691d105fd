"""The embedded models' tokenizers, with a chat template that writes a prompt as training does.

For word problems each word is a token, and so is each number from 0 to 99: a step of a solution is
then one look-up in an addition table. For Sudoku each cell is a token. What is outside the
vocabulary becomes `[UNK]`.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsb_runtime.demo import problems, sudoku

EOS = problems.EOS_TEXT  # also the padding token, as in LLaDA
MASK = "<|mdm_mask|>"
UNKNOWN = "[UNK]"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = (EOS, MASK, UNKNOWN, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{% if message['role'] == 'assistant' %}}{ASSISTANT} {{{{ message['content'] }}}}{EOS}"
    f"{{% else %}}{USER} {{{{ message['content'] }}}} {{% endif %}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)


def vocabulary() -> list[str]:
    """Every token of the word problems, in the order of its id."""
    words = [*SPECIAL_TOKENS, *(str(n) for n in range(problems.MAX_TOTAL + 1))]
    words += [".", "?", "+", "-", "*", "/", "="]
    words += [*problems.DAYS, *problems.PRONOUNS, *dict.fromkeys(problems.PRONOUNS.values())]
    words += [*problems.THINGS, *problems.GAINS, *problems.LOSSES, *problems.OTHER_WORDS]
    for phrase in (*problems.REST_DAYS, problems.DOUBLING, problems.HALVING):
        words += phrase.split()
    return list(dict.fromkeys(words))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of word problems."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    # Words get their spaces back and full stops lose theirs: "= 19." and not "= 19 .".
    return _finish(vocabulary(), split, decoders.WordPiece(prefix="##", cleanup=True))


def build_sudoku_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of Sudoku, whose text has a character for each cell."""
    cells = [sudoku.BLANK, *(str(digit) for digit in range(1, sudoku.SIZE + 1))]
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.\d]"), "isolated")]
    )
    return _finish([*SPECIAL_TOKENS, *cells], split, decoders.Fuse())


def _finish(
    words: list[str], split: pre_tokenizers.PreTokenizer, decoder: decoders.Decoder
) -> PreTrainedTokenizerFast:
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, mask_token=MASK,
        unk_token=UNKNOWN, extra_special_tokens=[USER, ASSISTANT], chat_template=CHAT_TEMPLATE,
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def chat_text(prompt: str) -> str:
    """What the chat template makes of one user message, before tokenization."""
    return f"{USER} {prompt} {ASSISTANT}"

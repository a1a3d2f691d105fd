"""Without a GPU the kernels run under Triton's interpreter, chosen before Triton is imported."""

import importlib.util
import os
import signal

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # The interpreter evaluates both sides of every tl.where in NumPy, inf - inf included.
    np.seterr(all="ignore")

if importlib.util.find_spec("triton"):
    from tests.interpreter import repair_bfloat16

    repair_bfloat16()

# A shell that runs tests in the background lets them ignore Ctrl-C, and so would the processes that
# they start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests' tensors are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


def pytest_configure(config):
    # The interpreter's max over nothing but NaN, which is what the chip would return as well.
    config.addinivalue_line("filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning")


@pytest.fixture
def production():
    """Asks for the table's own configurations (see `small_tiles` in tests/op_contract.py)."""


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """The folder of the golden LLaDA with a tokenizer. No test changes it."""
    from tests.checkpoints import write_chat_model

    return write_chat_model(tmp_path_factory.mktemp("chat"))

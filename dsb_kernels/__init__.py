"""Kernels of diffusion-language-model decoding: tensors only, one op per module.

Every module holds the op's plain-PyTorch definition, its Triton kernel and the public function.
"""

__version__ = "0.2.0"

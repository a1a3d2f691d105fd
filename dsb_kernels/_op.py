"""How an op is registered and where it runs.

On CUDA tensors an op runs its Triton kernel, on CPU tensors its definition in plain PyTorch.
`DSB_BACKEND=eager` and `DSB_BACKEND=triton` override that. If `TRITON_INTERPRET=1` is set before
Triton is imported, `DSB_BACKEND=triton` runs the kernels on CPU tensors under Triton's interpreter.
Without Triton (it exists only for Linux) the package works with the definitions alone.

`op` makes the public function of an op out of its definition. The schema that torch needs is made
from the definition's signature, so an op's arguments stand in two places only, the definition and
the kernel.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

BACKENDS = ("eager", "triton")

P = ParamSpec("P")
R = TypeVar("R")


def code_hash(folder: Path) -> str:
    """A short hash of the Python files in a folder."""
    files = sorted(folder.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


# torch.compile keeps what it compiled on disk, under a key that knows the names of our ops but not
# their code. Without this tag, an edited or upgraded op would be answered by the code before it.
torch.compiler.config.cache_key_tag += f" dsb_kernels {code_hash(Path(__file__).parent)}"


def jit(fn: Callable | None = None, **options: Any) -> Any:
    """Decorate a kernel with `triton.jit`. Without Triton the function stays as it is: nothing
    launches it then."""
    if triton is None:
        return fn if fn is not None else (lambda f: f)
    return triton.jit(fn, **options)


def interpreted() -> bool:
    """Whether kernels run under the interpreter. Triton decides that when it decorates them."""
    return triton is not None and triton.knobs.runtime.interpret


def use_triton(*tensors: Tensor | None) -> bool:
    """Whether an op on these tensors (None is skipped) launches its Triton kernel.

    Raises:
        ValueError: `DSB_BACKEND` is neither "eager" nor "triton".
        RuntimeError: `DSB_BACKEND=triton` where no Triton kernel can run.
    """
    backend = os.environ.get("DSB_BACKEND", "")
    if backend and backend not in BACKENDS:
        raise ValueError(f"DSB_BACKEND={backend!r}: accepted are 'eager', 'triton' or unset")
    present = [t for t in tensors if t is not None]
    on_cuda = all(t.is_cuda for t in present)
    if not backend:
        return on_cuda and triton is not None
    if backend == "eager":
        return False
    if triton is None:
        raise RuntimeError("DSB_BACKEND=triton: Triton is not installed")
    if on_cuda:
        return True
    # The interpreter needs data; shape propagation and tracing see the definition instead.
    if any(isinstance(t, FakeTensor | FunctionalTensor) for t in present):
        return False
    if not interpreted():
        raise RuntimeError("DSB_BACKEND=triton on CPU tensors: only with TRITON_INTERPRET=1")
    return True


def constant(value: int) -> Any:
    """Wrap a number so that a kernel can read it as a global: Triton accepts no other type."""
    return tl.constexpr(int(value)) if tl else int(value)


def op(
    definition: Callable[P, R],
    *,
    launch: Callable[[Any], Any],
    check: Callable[[Any], None],
    finish: Callable[[Any, Any], Any] | None = None,
    mutates_args: Sequence[str] = (),
    fake: Callable[[Any], Any] | None = None,
) -> Callable[P, R]:
    """The public function of an op, `dsb::<name of the definition without _reference>`.

    `torch.compile` sees through the op: it traces the operators of the definition, or the kernel
    launches (`wrap_triton`).

    Args:
        definition: the op in plain PyTorch. Its first parameter is a tensor, whose device decides
            whether the kernel or the definition runs. Its annotations become the op's schema, its
            docstring the public one. If a parameter is annotated with a class that has
            `encode() -> str` and `decode(str)`, torch is passed that string. A parameter of type
            `Sequence[int]` may have a tuple as its default. The definition returns types that a
            schema can express, or a NamedTuple of them.
        launch: takes the arguments as a named tuple `a`, which has a field for each parameter of
            the definition (`a.x`), launches the kernel and returns what the definition returns.
        check: takes the same `a`, and raises what the public docstring promises.
        finish: takes `a` and the op's result, and returns the public result. None where these
            results are the same.
        mutates_args: the parameters that the op writes in place.
        fake: needed where the definition reads a tensor's values, which cannot be traced. It takes
            `a` and returns an empty tensor of the result's shape. `torch.compile` then traces one
            call of the definition, `dsb::<name>_definition`.

    The returned function has the attributes `op` (what torch registered), `definition`, and
    `without_checks` (see `unchecked`).
    """
    name = definition.__name__.removesuffix("_reference")
    hints = typing.get_type_hints(definition)
    Arguments, bind = _binding(name, inspect.signature(definition).parameters)
    coded = {
        n: hints[n]
        for n in Arguments._fields
        if hasattr(hints[n], "encode") and hasattr(hints[n], "decode")
    }
    schema = hints | dict.fromkeys(coded, str)
    named: Any = hints["return"] if hasattr(hints["return"], "_fields") else None
    if named:
        schema["return"] = tuple[tuple(typing.get_type_hints(named).values())]  # type: ignore[misc]

    plain: Callable[..., Any] = definition

    def by_position(*args: Any) -> Any:
        return plain(**Arguments(*args)._asdict())

    traced: Callable[..., Any] = by_position
    by_position.__signature__ = signature = _torch_signature(definition, schema)  # type: ignore[attr-defined]
    if fake is not None:
        traced = _custom_op(
            f"{name}_definition", by_position, lambda *a: fake(Arguments(*a)), mutates_args
        )

    def implementation(*args: Any, **kwargs: Any) -> Any:
        a: Any = Arguments(*args, **kwargs)
        if coded:
            a = a._replace(**{n: kind.decode(getattr(a, n)) for n, kind in coded.items()})
        result = launch(a) if use_triton(a[0]) else traced(*a)
        return tuple(result) if named else result

    implementation.__name__ = name
    implementation.__signature__ = signature  # type: ignore[attr-defined]
    registered = _register(name, implementation, mutates_args)

    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        check(bind(args, kwargs))
        return without_checks(*args, **kwargs)

    def without_checks(*args: P.args, **kwargs: P.kwargs) -> Any:
        a: Any = Arguments(*args, **kwargs)
        # Torch's dispatch takes 70 us, so the definition is called directly where it would run
        # anyway. The compiler gets the registered op, since it can trace that one's dispatch.
        if not torch.compiler.is_compiling() and not use_triton(a[0]):
            result = call.definition(*args, **kwargs)  # type: ignore[attr-defined]
        else:
            result = registered(*a._replace(**{n: getattr(a, n).encode() for n in coded}))
            result = named(*result) if named else result
        return result if finish is None else finish(a, result)

    functools.update_wrapper(call, definition)
    call.__name__ = call.__qualname__ = name
    call.op, call.definition = registered, definition  # type: ignore[attr-defined]
    call.without_checks = without_checks  # type: ignore[attr-defined]
    return call


def unchecked(op: Callable[P, R]) -> Callable[P, R]:
    """The same op without the checks of its arguments, which take 50 us for the ops of a layer.
    The engine uses it, since it makes the arguments itself."""
    return op.without_checks  # type: ignore[attr-defined]


def _binding(
    name: str, parameters: Mapping[str, inspect.Parameter]
) -> tuple[Any, Callable[[tuple[Any, ...], dict[str, Any]], Any]]:
    """A named tuple of an op's parameters, and a function that makes one of a call's arguments.

    Binding by a named tuple takes a microsecond; inspect.Signature.bind takes ten.
    """
    fields = [*parameters]
    defaults = [p.default for p in parameters.values() if p.default is not p.empty]
    if any(parameters[n].default is not inspect.Parameter.empty for n in fields[: -len(defaults)]):
        raise TypeError(f"{name}: a parameter without a default follows one with a default")
    Arguments: Any = collections.namedtuple(name, fields, defaults=defaults)  # type: ignore[misc]
    positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters.values())

    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > positional:
            raise TypeError(
                f"{name}() takes {positional} positional arguments and the rest by name; "
                f"{len(args)} were given"
            )
        try:
            return Arguments(*args, **kwargs)
        except TypeError as error:
            raise TypeError(str(error).replace(".__new__()", "()")) from None

    return Arguments, bind


def _torch_signature(definition: Callable, hints: dict[str, Any]) -> inspect.Signature:
    """The signature from which torch makes a schema. Every parameter is positional. A schema has no
    tuples: if any default is a tuple, every parameter loses its default."""
    signature = inspect.signature(definition)
    known = not any(isinstance(p.default, tuple) for p in signature.parameters.values())
    return signature.replace(
        parameters=[
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                annotation=hints[name],
                default=p.default if known else inspect.Parameter.empty,
            )
            for name, p in signature.parameters.items()
        ],
        return_annotation=None if hints["return"] is type(None) else hints["return"],
    )


def _register(name: str, fn: Callable, mutates_args: Sequence[str]) -> Callable:
    if triton is not None:
        return torch.library.triton_op(f"dsb::{name}", fn, mutates_args=tuple(mutates_args))
    return _custom_op(name, fn, fn, mutates_args)


def _custom_op(name: str, fn: Callable, fake: Callable, mutates_args: Sequence[str]) -> Callable:
    """Register an op that the compiler does not look into. `fake` computes its shapes."""
    custom = torch.library.custom_op(f"dsb::{name}", fn, mutates_args=tuple(mutates_args))
    custom.register_fake(fake)
    return custom

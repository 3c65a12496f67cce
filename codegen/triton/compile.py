"""The worker of ``build.py``: emitted Triton text in, cubins and PTX out.

A program of its own, run by path and not as a module of tokenmill: it needs Triton alone, and the package
would bring torch, which takes longer to import than a kernel to compile.

    python -P compile.py DIRECTORY CAPABILITY

DIRECTORY has the emitted files as a package ``emitted``, and gets ``NAME.cubin`` and ``NAME.ptx``.  Each line
of input is an entry of the schedule's ``binaries``, and is answered by a line of JSON: what Triton says of
the kernel, or ``{"error": TEXT}``.  No GPU is needed, and TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PACKAGE = "emitted"
WARP = 32


def compile_binary(binary: dict[str, Any], directory: Path, capability: int) -> dict[str, Any]:
    """Write one binary's files; what its launch needs to know."""
    module = import_module(f"{PACKAGE}.{Path(binary['file']).stem}")
    function = getattr(module, binary["function"])
    params, constants = binary["params"], binary["constants"]
    names = function.arg_names
    if set(names[len(params) :]) != set(constants):
        raise TypeError(f"constants {sorted(constants)} for parameters {names[len(params) :]}")
    types = [type_ for type_, _ in params] + ["constexpr"] * len(constants)
    source = ASTSource(
        function,
        dict(zip(names, types, strict=True)),
        constants,
        {(i,): [["tt.divisibility", 16]] for i, (_, aligned) in enumerate(params) if aligned},
    )
    options = {
        "num_warps": binary["warps"],
        "num_stages": binary["stages"],
        # Triton 3.10 no longer joins a multiplication and a sum unless told to.
        "enable_fp_fusion": True,
    }
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    (directory / f"{binary['name']}.cubin").write_bytes(kernel.asm["cubin"])
    (directory / f"{binary['name']}.ptx").write_text(kernel.asm["ptx"])
    about = kernel.metadata
    return {
        "kernel": about.name,
        "threads": about.num_warps * WARP,
        "shared_bytes": about.shared,
        "tensor_memory": getattr(about, "tmem_size", None) or 0,
        "scratch": [
            {"bytes": bytes_ or 0, "align": align or 1}
            for bytes_, align in (
                (about.global_scratch_size, about.global_scratch_align),
                (about.profile_scratch_size, about.profile_scratch_align),
            )
        ],
    }


def main() -> None:
    directory, capability = Path(sys.argv[1]), int(sys.argv[2])
    sys.path.insert(0, str(directory))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Triton prints besides is in its errors too
    for line in sys.stdin:
        os.ftruncate(2, 0)
        try:
            answer = compile_binary(json.loads(line), directory, capability)
        except Exception as error:
            answer = {"error": "".join(traceback.format_exception_only(error))}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

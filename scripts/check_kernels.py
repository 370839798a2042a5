"""Compiles the Triton kernels for GPUs that need not be there, and fails if one spills registers to memory.

    python scripts/check_kernels.py                        sm_80, sm_90 and sm_100
    python scripts/check_kernels.py --arch 90 --quick      three kernels for sm_90

Prints a table: registers per thread, shared memory per program, loads and stores of spilled registers, and the bytes that
a token must move between the chip and its memory if everything is read and written once. Exit status: 1 when a kernel
spills or does not compile, 2 without the package triton. The table goes into docs/kernels.md.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions can't be compiled
ARCHITECTURES = (80, 90, 100)
STORED = ("gate_up", "z", "dz", "d_gate_up", "y", "out", "d_out", "d_y", "logits", "x")
"""Arguments in the dtype of the model (the router has its own `logits`, in float32); others are float32 or as INTEGERS says."""
INTEGERS = {"rows": "*i64", "ids": "*i64", "counts": "*i32", "tokens": "i32", "columns": "*i64"}
NUMBERS = {"floor": "fp32", "route_scale": "fp32"}
BYTES = {"bf16": 2, "fp32": 4}


class Job(NamedTuple):
    """One kernel with everything that it is specialised for, as its launcher in torchtitan_ext/kernels calls it."""

    name: str
    kernel: Any
    dtype: str
    constants: dict[str, Any]
    warps: int
    bytes_per_token: int


class Usage(NamedTuple):
    """What the assembler made of a kernel."""

    registers: int
    shared: int
    spills: int


def swiglu_jobs() -> Iterator[Job]:
    from torchtitan_ext.kernels import swiglu as s

    cases = (
        ("alone", s.PLAIN, 1, 1744, "bf16"),
        ("cosines", s.COSINES, 4, 672, "bf16"),
        ("cosines", s.COSINES, 6, 1744, "bf16"),
        ("cosines", s.COSINES, 4, 672, "fp32"),
        ("Gram", s.GRAM, 6, 872, "bf16"),
    )
    for what, mode, k, width, dtype in cases:
        size, constants = BYTES[dtype], {"F": width, **s.tile_sizes(k), "BLOCK": s.BLOCK, "STAGES": s.STAGES}
        per_token = 0 if mode == s.PLAIN else 4 * k * k + 8 * k  # C or the Gram matrix, and the row numbers
        for_cosines = 4 * k + 8 if mode == s.COSINES else 0  # scales and two values per token; one in the backward
        name = f"{what}{', gated' if dtype == 'bf16' else ''}, {dtype}, k={k}, F={width}"
        constants["GATED"] = dtype == "bf16"
        per_token += 4 * k if constants["GATED"] else 0  # a gate weight per row
        forward = {"MODE": mode.value, "PRECISION": "native" if dtype == "bf16" else "ieee"}
        backward = {"MODE": mode.value, "PRECISION": "tf32" if dtype == "bf16" else "ieee"}
        moved = 3 * k * width * size + per_token + for_cosines
        yield Job(f"SwiGLU forward, {name}", s.forward_kernel, dtype, constants | forward, s.WARPS, moved)
        moved = 5 * k * width * size + per_token + max(for_cosines - 4, 0) + (4 * k if constants["GATED"] else 0)
        yield Job(f"SwiGLU backward, {name}", s.backward_kernel, dtype, constants | backward, s.WARPS, moved)


def combine_jobs() -> Iterator[Job]:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]

    from torchtitan_ext.kernels import combine as c

    k, dim, size = 6, 768, BYTES["bf16"]
    constants = {"D": dim, "K": k, "BLOCK": c.BLOCK}
    name = f"bf16, k={k}, D={dim}"
    moved = (k + 1) * dim * size + 12 * k
    yield Job(f"combine, {name}", c.combine_kernel, "bf16", constants | {"GATED": True}, c.WARPS, moved)
    constants |= {"KP": triton.next_power_of_2(k)}
    moved = (2 * k + 1) * dim * size + 16 * k
    yield Job(f"combine backward, {name}", c.combine_backward_kernel, "bf16", constants, c.WARPS, moved)


def router_jobs() -> Iterator[Job]:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]

    from torchtitan_ext.kernels import router as r

    names = ("HAS_SCORES", "HAS_GATES", "HAS_LSE", "HAS_MASS", "HAS_SHARES")
    for experts, k, sigmoid in ((64, 4, False), (96, 6, False), (256, 8, True)):
        constants = r.sizes(experts, k) | {"SIGMOID": sigmoid}
        name = f"{'sigmoid' if sigmoid else 'softmax'}, k={k}, E={experts}"
        choice, both = {"KP": triton.next_power_of_2(k)}, {"NORMALIZE": sigmoid}
        row, parts = (
            4 * experts,
            8 * experts // constants["TOKENS"],
        )  # a row of float32, and a token's part of partial sums
        moved = row + 8 * k
        yield Job(f"router choice, {name}", r.choose_kernel, "fp32", constants | choice, r.WARPS, moved)
        moved = 2 * row + 12 * k + 20 + parts
        yield Job(f"router forward, {name}", r.forward_kernel, "fp32", constants | choice | both, r.WARPS, moved)
        # The gradients of lb, z, cp and the gates; of the scores themselves only with terms that read them.
        given = dict.fromkeys(names, True) | {"HAS_SCORES": False}
        moved = 2 * row + 12 * k + 12
        yield Job(f"router backward, {name}", r.backward_kernel, "fp32", constants | both | given, r.WARPS, moved)


def cross_entropy_jobs() -> Iterator[Job]:
    from torchtitan_ext.kernels import cross_entropy as c

    for what, parts, vocabulary in (("", (True, True), 32000), (" of two ranks", (False, True), 64128)):
        constants = {"V": vocabulary, "BLOCK": c.BLOCK, "STATISTICS": parts[0], "GRADIENT": parts[1]}
        moved = 2 * vocabulary * BYTES["bf16"] + 24  # the second reading of a row is from the cache
        yield Job(
            f"cross-entropy{what}, bf16, V={vocabulary}", c.cross_entropy_kernel, "bf16", constants, c.WARPS, moved
        )


def rotary_jobs() -> Iterator[Job]:
    from torchtitan_ext.kernels import rotary as r

    for heads, width, half in ((8, 64, 32), (32, 128, 64), (16, 128, 32)):
        constants = r.sizes(heads, width, half) | {"BACK": False}
        moved = 2 * heads * width * BYTES["bf16"] + 8 * half
        yield Job(
            f"rotary, bf16, H={heads}, d={width}, w={2 * half}", r.rotate_kernel, "bf16", constants, r.WARPS, moved
        )


def jobs(quick: bool) -> list[Job]:
    """All kernels; quick: both ways of SwiGLU with cosines, and the gradient of the largest router."""
    every = [*swiglu_jobs(), *combine_jobs(), *cross_entropy_jobs(), *rotary_jobs(), *router_jobs()]
    return [every[2], every[3], every[-1]] if quick else every


def compiled(job: Job, arch: int) -> Any:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from triton.compiler import ASTSource  # type: ignore[import-not-found,import-untyped,unused-ignore]

    def type_of(name: str) -> str:
        if name in job.constants:
            return "constexpr"
        return INTEGERS.get(name) or NUMBERS.get(name) or (f"*{job.dtype}" if name in STORED else "*fp32")

    signature = {name: type_of(name) for name in job.kernel.arg_names}
    # PyTorch's allocations are aligned; without this the compiler must assume the worst.
    pointers = [place for place, kind in enumerate(signature.values()) if kind.startswith("*")]
    aligned = {(place,): [["tt.divisibility", 16]] for place in pointers}
    source = ASTSource(job.kernel, signature, constexprs=job.constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": job.warps})


def usage(binary: Any) -> Usage:
    """Registers as the assembler reports them; spills as local loads and stores in the machine code."""
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        reports = [
            subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        ]
    (registers,) = re.findall(r"REG:(\d+)", reports[0])
    return Usage(int(registers), binary.metadata.shared, len(re.findall(r"\b(?:STL|LDL)\b", reports[1])))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="compute capability, 90: H100")
    parser.add_argument("--quick", action="store_true", help="three kernels only")
    arguments = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        print("scripts/check_kernels.py needs the package triton: pip install triton", file=sys.stderr)
        return 2
    print("| GPU | kernel | registers | shared memory, bytes | spills | bytes per token |\n|---|---|---|---|---|---|")
    failed = 0
    for arch in arguments.arch or ARCHITECTURES:
        for job in jobs(arguments.quick):
            used = usage(compiled(job, arch))
            failed += used.spills > 0
            cells = (f"sm_{arch}", job.name, used.registers, used.shared, used.spills, job.bytes_per_token)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if failed:
        print(f"{failed} kernels spill registers", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

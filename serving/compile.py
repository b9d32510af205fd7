"""Compile the network ahead of time: `python -m serving.compile --checkpoint FILE --out FOLDER`.

AOTInductor makes shared libraries of it. That needs a C++ compiler and so happens in the image's build stage; the
detector falls back to eager torch wherever no library fits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.export import Dim

from serving.detector import FromPictures, best_precision, compiled_network, cpu_flags, dtype_name, file_sha256
from serving.looks import TILE
from serving.network import load_network
from serving.pictures import LONGEST_SIDE

# What a package is compiled for: GCC's micro-architecture level, vector width in bits, and what the processor
# that loads it must have. https://gcc.gnu.org/onlinedocs/gcc/x86-Options.html
TARGETS = {
    torch.float32: ("x86-64-v3", 256, ["avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"]),
    torch.bfloat16: (
        "x86-64-v4", 512, ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16"],
    ),
}  # fmt: skip


# Heights and widths after the letterbox of the shapes that cameras and phones make, at a stride of 32, and of a tile: a
# library that knows its shape is a tenth faster.
COMMON_SHAPES = ((640, 480), (480, 640), (TILE, TILE))
MOST_APART = 0.05  # in probability; bfloat16 rounds by 0.014


def compile_network(
    checkpoint: Path, counted: str, precision: torch.dtype, out: Path, shapes: Sequence[tuple[int, int]] = ()
) -> None:
    """Write a library for pictures of any shape and one for each of shapes (height, width) into out.

    `<precision>.json`, written last, says which processors and shapes they fit.
    """
    march, bits, needs = TARGETS[precision]
    network = load_network(checkpoint)
    network.keep_only(counted)
    stride = max(network.head.strides)
    model = FromPictures(network.on(torch.device("cpu"), precision)).eval()
    most = -(-LONGEST_SIDE // stride)  # in strides
    free = {1: Dim("h", min=1, max=most) * stride, 2: Dim("w", min=1, max=most) * stride}
    out.mkdir(parents=True, exist_ok=True)
    libraries = {}
    for shape in (None, *(s for s in shapes if s[0] % stride == s[1] % stride == 0)):
        name = f"{shape[0]}x{shape[1]}" if shape else "any"
        libraries[name] = f"{dtype_name(precision)}-{name}.so"
        height, width = shape or (most * stride, (most - 1) * stride)
        picture = torch.zeros((1, height, width, 3), dtype=torch.uint8)
        with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
            program = torch.export.export(model, (picture,), dynamic_shapes=None if shape else {"pictures": free})
            package = torch._inductor.aoti_compile_and_package(
                program,
                package_path=f"{folder}/network.pt2",
                inductor_configs={"freezing": True, "cpp.march": march, "cpp.simdlen": bits},
            )
            # Unpacked here: torch would do so at every start, into a folder that may be mounted noexec.
            with zipfile.ZipFile(package) as archive:
                inside = next(entry for entry in archive.namelist() if entry.endswith(".so"))
                (out / libraries[name]).write_bytes(archive.read(inside))
    facts = {
        "weights": file_sha256(checkpoint), "counted": counted, "torch": torch.__version__, "cpu_flags": needs,
        "libraries": libraries,
    }  # fmt: skip
    (out / f"{dtype_name(precision)}.json").write_text(json.dumps(facts, indent=1) + "\n")


def check_network(checkpoint: Path, counted: str, precision: torch.dtype, out: Path) -> None:
    """Run each library in out once. Raises RuntimeError where one computes otherwise than the eager network.

    A library that the processor cannot run ends this process, instead of the workers that would load it.
    """
    network = load_network(checkpoint)
    network.keep_only(counted)
    eager = FromPictures(network.on(torch.device("cpu"), precision)).eval()
    compiled = compiled_network(out, file_sha256(checkpoint), counted, precision)
    if compiled is None:
        raise RuntimeError(f"{out} has no library for {dtype_name(precision)} that fits this machine")
    for height, width in (*COMMON_SHAPES, (640, 640)):
        picture = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8)
        with torch.inference_mode():
            pairs = zip(eager(picture), compiled(picture), strict=True)
            apart = torch.stack([(a.float().sigmoid() - b.float().sigmoid()).abs().max() for a, b in pairs]).max()
        if not apart <= MOST_APART:  # also if it is not a number
            raise RuntimeError(f"the library for {height}×{width} differs from the eager network by {apart:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counted", default="person")
    parser.add_argument(
        "--require",
        choices=[dtype_name(p) for p in TARGETS],
        default=[],
        action="append",
        help="fail without this precision",
    )
    parser.add_argument(
        "--here",
        action="store_true",
        help="only for the precision that this processor counts with, and check the result",
    )
    arguments = parser.parse_args()
    best = best_precision(torch.device("cpu"))
    # float32 also where this processor has better: the image may run where there is no bfloat16.
    for precision in [best] if arguments.here else TARGETS:
        missing = set(TARGETS[precision][2]) - cpu_flags()
        if missing and dtype_name(precision) in arguments.require:
            raise SystemExit(
                f"The network cannot be compiled for {dtype_name(precision)} here: this processor lacks "
                f"{', '.join(sorted(missing))}, and the compiler needs them. Build on a machine that has them, as "
                "Google's C3, C4 and N4 machines do, or build without: the image then counts more slowly."
            )
        if missing:
            print(f"not compiling for {dtype_name(precision)}: this processor lacks {', '.join(sorted(missing))}")
            continue
        print(f"compiling for {dtype_name(precision)}", flush=True)
        shapes = COMMON_SHAPES if precision is best else ()
        compile_network(arguments.checkpoint, arguments.counted, precision, arguments.out, shapes)
        if arguments.here:
            check_network(arguments.checkpoint, arguments.counted, precision, arguments.out)


if __name__ == "__main__":
    main()

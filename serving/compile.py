"""Compile the network ahead of time: `python -m serving.compile --checkpoint FILE --out FOLDER`.

Makes one shared library a precision with AOTInductor, good for every picture shape; it needs a C++ compiler and so
runs in the image's build stage. The detector falls back to eager torch wherever no library fits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zipfile
from pathlib import Path

import torch
from torch.export import Dim

from serving.detector import FromPictures, best_precision, cpu_flags, file_sha256, word
from serving.network import load_network

# What a package is compiled for: GCC's micro-architecture level, vector width in bits, and what the processor
# that loads it must have. https://gcc.gnu.org/onlinedocs/gcc/x86-Options.html
TARGETS = {
    torch.float32: ("x86-64-v3", 256, ["avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"]),
    torch.bfloat16: (
        "x86-64-v4", 512, ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16"],
    ),
}  # fmt: skip


def compile_network(checkpoint: Path, counted: str, precision: torch.dtype, out: Path) -> Path:
    """Write `<precision>.so` and, last, the `.json` that says what it fits, into out."""
    march, bits, needs = TARGETS[precision]
    network = load_network(checkpoint)
    network.keep_only(counted)
    stride = max(network.head.strides)
    model = FromPictures(network.on(torch.device("cpu"), precision)).eval()
    picture = torch.zeros((1, 20 * stride, 15 * stride, 3), dtype=torch.uint8)
    most = -(-640 // stride)  # longest side in strides
    shape = {1: Dim("h", min=1, max=most) * stride, 2: Dim("w", min=1, max=most) * stride}
    out.mkdir(parents=True, exist_ok=True)
    library = out / f"{word(precision)}.so"
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(model, (picture,), dynamic_shapes={"pictures": shape})
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=f"{folder}/network.pt2",
            inductor_configs={"freezing": True, "cpp.march": march, "cpp.simdlen": bits},
        )
        # The package is unpacked here: torch would do so at every start, into a folder that may be mounted noexec.
        with zipfile.ZipFile(package) as archive:
            inside = next(name for name in archive.namelist() if name.endswith(".so"))
            library.write_bytes(archive.read(inside))
    facts = {
        "weights": file_sha256(checkpoint), "counted": counted, "torch": torch.__version__, "cpu_flags": needs,
    }  # fmt: skip
    library.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counted", default="person")
    arguments = parser.parse_args()
    flags = cpu_flags()
    for precision, (march, _, needs) in TARGETS.items():
        # float32 too where this processor has better: the image may run where there is no bfloat16.
        if set(needs) <= flags:
            print(f"compiling for {precision}, {march}", flush=True)
            print(compile_network(arguments.checkpoint, arguments.counted, precision, arguments.out))
        else:
            print(f"not compiling for {precision}: this processor lacks {sorted(set(needs) - flags)}")
    if best_precision(torch.device("cpu")) is torch.float32:
        print("where the image runs on a processor with bfloat16, it will use eager bfloat16")


if __name__ == "__main__":
    main()

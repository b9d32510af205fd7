"""Where the image's torch comes from: `python -m infra.torch_source` prints it. Standard library only."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def torch_source(root: Path, say: Callable[[str], object]) -> str:
    """`cpu` where PyTorch's CPU index answers, else `index`, the package index.

    The decision is kept for the checkout, because another answer makes another image. A team sets `torch` in the
    stack's file instead.
    """
    decided = root / ".headcount" / "torch-source"
    if decided.exists():
        return decided.read_text()
    (wanted,) = re.findall(r"^(torch==[\d.]+)", (root / "requirements" / "torch.txt").read_text(), re.MULTILINE)
    # uv knows the index's address. --dry-run asks it, and installs nothing.
    asked = subprocess.run(
        [root / ".tools" / "bin" / "uv", "pip", "install", "--dry-run", "--no-deps", "--python", sys.executable,
         "--python-platform", "x86_64-manylinux_2_28", "--target", root / ".headcount" / "none",
         "--torch-backend", "cpu", wanted],
        env={**os.environ, "UV_HTTP_TIMEOUT": "10", "UV_HTTP_RETRIES": "0"}, capture_output=True, check=False,
    )  # fmt: skip
    source = "index" if asked.returncode else "cpu"
    decided.parent.mkdir(exist_ok=True)
    decided.write_text(source)
    if source == "cpu":
        say("The image takes torch from PyTorch's CPU index: it will have about 1.3 GB.")
    else:
        say("The image takes torch from the package index, because PyTorch's CPU index does not answer: about 4 GB.")
    return source


if __name__ == "__main__":
    print(torch_source(Path(), lambda line: print(line, file=sys.stderr)))

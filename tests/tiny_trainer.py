"""A training of some lines with the contract of the training image, for the tests' tiny image.

Standard library only. It counts the lines of the files of its options, and writes a model that says so. With --break it
fails.
"""

import json
import os
import pathlib
import sys


def mounted(uri: str) -> pathlib.Path:
    return pathlib.Path("/gcs") / uri.removeprefix("gs://")


if __name__ == "__main__":
    module, *options = sys.argv[1:]
    named = dict(option.removeprefix("--").split("=", 1) for option in options if "=gs://" in option)
    lines = {name: len(mounted(uri).read_text().splitlines()) for name, uri in named.items()}
    print(json.dumps({"message": f"{module} read {sum(lines.values())} lines"}), flush=True)
    if "--break" in options:
        sys.exit("the data is broken")
    for variable, name in (
        ("AIP_CHECKPOINT_DIR", "step-1.pt"),
        ("AIP_TENSORBOARD_LOG_DIR", "events"),
        ("AIP_MODEL_DIR", "model.pt2"),
        ("AIP_MODEL_DIR", "contract.json"),
    ):
        file = mounted(os.environ[variable]) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"lines": lines, "options": options}))

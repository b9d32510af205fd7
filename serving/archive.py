"""Make the model archive that TorchServe serves: `python -m serving.archive --checkpoint FILE --out FOLDER`.

An unpacked archive (torch-model-archiver's "no-archive" form): TorchServe would unpack a .mar at every start, and
into a temporary folder where a compiled network may not be run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging import generate_model_archive


def make_archive(checkpoint: Path, out: Path, compiled: Path | None = None) -> None:
    """Put checkpoint, handler and compiled packages into out, which is replaced when the new archive is whole."""
    extra = sorted(compiled.iterdir()) if compiled else []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder, _private_temporary_folder(Path(folder)):
        version = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:12]
        generate_model_archive(
            ModelArchiverConfig(
                model_name="people", version=version, handler=str(Path(__file__).parent / "handler.py"),
                serialized_file=str(checkpoint), extra_files=",".join(map(str, extra)) or None,
                export_path=folder, archive_format="no-archive", force=True,
            )
        )  # fmt: skip
        if out.exists():
            shutil.rmtree(out)
        (Path(folder) / "people").rename(out)


@contextlib.contextmanager
def _private_temporary_folder(folder: Path) -> Iterator[None]:
    """Makes `folder` the temporary folder, because the archiver deletes what has the model's name in that.

    In the shared one that would be another process's model, or somebody's folder of pictures.
    """
    before, tempfile.tempdir = tempfile.tempdir, tempfile.mkdtemp(dir=folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compiled", type=Path)
    arguments = parser.parse_args()
    make_archive(arguments.checkpoint, arguments.out, arguments.compiled)


if __name__ == "__main__":
    main()

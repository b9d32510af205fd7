from typing import Final

BUILD: Final = "build"  # the `image` of a release that is built from the sources

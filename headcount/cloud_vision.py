"""Cloud Vision's object localisation as a counter, for a comparison. It costs money for each picture.

https://cloud.google.com/vision/docs/reference/rest/v1/images/annotate
"""

from __future__ import annotations

import base64
from typing import Final

from headcount.counters import CountError
from headcount.google import Google, GoogleError, Place

PERSON: Final = "Person"
MOST: Final = 100  # objects of a picture; Cloud Vision lists ten of them if nothing is said


class CloudVision(Google):
    """Counts the objects that Cloud Vision calls a person. project: the one that pays, by default the credentials'."""

    def __init__(self, project: str = "", base: str = "") -> None:
        super().__init__(Place(project, "", base))
        if project:
            self._http.headers["X-Goog-User-Project"] = project

    def count(self, picture: bytes) -> int:
        """The people in a picture. Raises CountError."""
        body = {
            "requests": [
                {
                    "image": {"content": base64.b64encode(picture).decode()},
                    "features": [{"type": "OBJECT_LOCALIZATION", "maxResults": MOST}],
                }
            ]
        }
        try:
            (answer,) = self.ask("POST", f"{self.place.api('vision')}/v1/images:annotate", body)["responses"]
        except GoogleError as error:
            raise CountError(str(error)) from None
        except (KeyError, ValueError):
            raise CountError("Cloud Vision's answer has not one response for the picture") from None
        if "error" in answer:
            raise CountError(f"Cloud Vision: {answer['error'].get('message', '')}")
        return sum(one.get("name") == PERSON for one in answer.get("localizedObjectAnnotations", []))

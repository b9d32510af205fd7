"""Ids and numbers of projects. Google's answers mostly name a project by its number; requests may use either."""

import hashlib

from sandbox.errors import GoogleError
from sandbox.store import Store


def project_number(project: str) -> str:
    """The number of a project, which the sandbox derives from its id. A number is returned as it is."""
    if project.isdigit():
        return project
    return str(10**11 + int.from_bytes(hashlib.sha256(project.encode()).digest()[:5]) % (9 * 10**11))


class Projects:
    """The projects that calls have named by their ids. Every id is a project; a number is one only after its id."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ids = {document["number"]: name for name, document in store.list("project") if not name.isdigit()}

    def meet(self, project: str) -> None:
        """Remembers a project that a call names by its id."""
        number = project_number(project)
        if project and not project.isdigit() and project not in "-_" and number not in self._ids:
            self._ids[number] = project
            with self._store.transaction():
                self._store.put("project", project, {"number": number})

    def knows(self, project: str) -> bool:
        """Whether a call has named the project, which is given by id or by number."""
        return project_number(project) in self._ids

    def by_id(self, name: str) -> str:
        """A resource name with the project's id where it has the number of a known project."""
        parts = name.split("/")
        if len(parts) > 1 and parts[0] == "projects" and parts[1] in self._ids:
            parts[1] = self._ids[parts[1]]
        return "/".join(parts)

    def check(self, project: str) -> None:
        """Raises PERMISSION_DENIED for the number of no known project, as Google does for a project it lacks."""
        if project.isdigit() and project not in self._ids:
            raise GoogleError(
                "PERMISSION_DENIED",
                f"Permission denied on resource project {project}. (The sandbox learns a project's number when a call "
                "names the project by its id.)",
            )

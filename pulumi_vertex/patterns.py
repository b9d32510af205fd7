"""What several inputs look like: a regular expression for the whole text, and what it asks for in words."""

from typing import Final

EMAIL: Final = r"[^@\s]+@[^@\s]+"
EMAIL_HINT: Final = "the e-mail of a service account"
FOLDER: Final = r"gs://[^/]+(/.*)?"
FOLDER_HINT: Final = "gs://BUCKET/FOLDER"
KMS_KEY: Final = r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+"
KMS_KEY_HINT: Final = "projects/PROJECT/locations/LOCATION/keyRings/RING/cryptoKeys/KEY"
MACHINE_TYPE: Final = r"[a-z][a-z0-9]*(-[a-z0-9]+)+"
MACHINE_TYPE_HINT: Final = "a machine type such as n1-standard-4"
ACCELERATOR: Final = r"[A-Z][A-Z0-9_]+"
ACCELERATOR_HINT: Final = "a name such as NVIDIA_L4"
LABEL_KEY: Final = r"[a-z][a-z0-9_-]{0,62}"
LABEL_KEY_HINT: Final = "1 to 63 of a-z, 0-9, _ and -, beginning with a letter"

"""Cloud Logging: what jobs write, as log entries, and the list of them."""

"""Artifact Registry: repositories, and the Docker registry that holds their images."""

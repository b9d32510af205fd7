"""What a team needs once for each Google Cloud project: docs/pull-requests.md has the commands."""

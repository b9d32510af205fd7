"""Pipeline jobs: their templates, their runs through KFP's local runner, and the details that they show."""

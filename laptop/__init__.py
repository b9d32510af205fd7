"""`make up`, `make deploy` and `make down`: the whole program on this machine, against the sandbox."""

"""`make up` and `make down`: the whole program on this machine, against the sandbox."""

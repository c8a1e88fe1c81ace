"""The type checker of the tests' import hook: beartype, to which an int is a float, as to other checkers."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))

"""Tools of this repository, which users do not need and which are not part of the wheel."""

"""Tools of this repository that users do not need; they are not part of the wheel."""

"""OpenAI's bodies, read and written: for `dsb serve` and for the lines of `dsb batch`. It needs no
extra."""

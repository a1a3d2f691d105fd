"""`dsb serve`: OpenAI's API over HTTP, on a `BatchEngine`. It needs the extra `serve`."""

MAX_QUEUE = 256  # how many rows may wait, where nobody says

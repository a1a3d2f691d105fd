"""Ask `dsb serve` with OpenAI's client, for a whole answer and for a stream.

    python examples/openai_client.py

The server is one of the embedded model, which this example starts at a free port.
"""

import subprocess
import sys

from openai import OpenAI

command = [sys.executable, "-m", "dsb_runtime", "serve", "--port", "0"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
try:
    name, url = server.stdout.readline().split()  # embedded: http://127.0.0.1:41235
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    question = {"role": "user", "content": "Ana has 20 pens. Monday she buys 3. How many pens now?"}
    answer = client.chat.completions.create(model=name.rstrip(":"), messages=[question])
    usage = answer.usage
    print(answer.choices[0].message.content)
    print(f"{usage.completion_tokens} tokens, {usage.forwards} forwards")

    # Settings of this package go into extra_body. A high threshold commits little at a time.
    stream = client.chat.completions.create(
        model="embedded", messages=[question], stream=True, extra_body={"threshold": 0.999}
    )
    pieces = [chunk.choices[0].delta.content for chunk in stream]
    print(*[piece for piece in pieces if piece], sep="|")
finally:
    server.terminate()
    server.wait()

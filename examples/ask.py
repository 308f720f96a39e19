"""One question, one answer: `python examples/ask.py [MODEL] [QUESTION]`."""

import sys

import localrun

name = sys.argv[1] if len(sys.argv) > 1 else "demo"
question = sys.argv[2] if len(sys.argv) > 2 else "Hello! Who are you?"

with localrun.load(name) as model:
    answer = model.ask(question, temperature=0)
    print(answer)
    print(f"{answer.timings.new_tokens} tokens, {answer.timings.decode_tokens_per_s:.1f} tokens/s", file=sys.stderr)

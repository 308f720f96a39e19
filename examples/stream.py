"""A conversation, printed as it is written, a line of standard input for each question: `python examples/stream.py [MODEL]`."""

import sys

import localrun


def loading(share: float, what: str) -> None:
    print(f"\r\033[K{share:4.0%}  {what}" if share < 1 else "\r\033[K", end="", file=sys.stderr, flush=True)


messages: list[dict[str, str]] = []
with localrun.load(sys.argv[1] if len(sys.argv) > 1 else "demo", progress=loading) as model:
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        text = ""
        for event in model.stream(messages):
            if isinstance(event, localrun.PromptProgress):
                print(f"\r\033[Kreading {event.done} of {event.total} tokens", end="", file=sys.stderr, flush=True)
            elif isinstance(event, localrun.Delta) and event.kind == "text":
                if not text:
                    print("\r\033[K", end="", file=sys.stderr, flush=True)
                print(event.text, end="", flush=True)
                text += event.text
        print()
        messages.append({"role": "assistant", "content": text})

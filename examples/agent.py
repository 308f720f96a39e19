"""An agent in 30 lines: tools run until the model has its answer: `python examples/agent.py [MODEL] [QUESTION]`."""

import json
import sys
from datetime import datetime

import localrun

TOOLS = [
    {
        "name": "now",
        "description": "Today's date and the time.",
        "parameters": {"type": "object", "properties": {}},
    }
]
RUN = {"now": lambda: datetime.now().isoformat(timespec="minutes")}

name = sys.argv[1] if len(sys.argv) > 1 else "demo"
messages = [{"role": "user", "content": sys.argv[2] if len(sys.argv) > 2 else "What day is it?"}]
with localrun.load(name) as model:
    for turn in range(8):  # the demo model never asks for a tool by itself
        choice = "required" if name == "demo" and turn == 0 else "auto"
        answer = model.ask(messages, tools=TOOLS, tool_choice=choice, temperature=0, max_tokens=500)
        messages.append(answer.message)
        if not answer.tool_calls:
            break
        for call in answer.tool_calls:
            result = (
                RUN[call.name](**json.loads(call.arguments)) if call.usable and call.name in RUN else "no such call"
            )
            print(f"{call.name}({call.arguments}) -> {result}", file=sys.stderr)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
print(answer)

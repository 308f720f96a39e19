"""Renders the generated conversations with DeepSeek's own encoder and writes down what came out, as digests.

    python tools/record_prompts.py v4 encoding/encoding_dsv4.py tests/fixtures/prompts-v4.txt
    python tools/record_prompts.py v4-0731 encoding/encoding_dsv4.py tests/fixtures/prompts-v4-0731.txt

The encoder is in the folder `encoding` of DeepSeek's releases: Flash's first one for `v4`, Flash-0731 for `v4-0731`. It is not part
of localrun; `tests/engine/chat/test_official_encoder.py` compares with the digests.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.engine.generated_conversations import EFFORTS, Generated, generated_conversations


def load(path: Path) -> ModuleType:
    """The official encoder as a module, from its file."""
    spec = importlib.util.spec_from_file_location("official_encoder", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path}: no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest(prompt: str) -> str:
    """The first 12 digits of the prompt's SHA-256."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


def official(encoder: ModuleType, conversation: Generated) -> str:
    """The digest of what it renders, or `-` where it fails."""
    try:
        prompt = encoder.encode_messages(
            copy.deepcopy(conversation.messages),
            thinking_mode="thinking" if conversation.thinking else "chat",
            drop_thinking=conversation.drop_thinking,
            reasoning_effort=conversation.effort,
        )
    except Exception:  # whatever it fails with, it has no answer
        return "-"
    return digest(prompt)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write down what DeepSeek's own encoder makes of generated conversations"
    )
    parser.add_argument("generation", choices=EFFORTS, help="of the prompt format")
    parser.add_argument("encoder", type=Path, help="encoding_dsv4.py of the release")
    parser.add_argument("target", type=Path, help="file for the digests, one a line")
    args = parser.parse_args()
    encoder = load(args.encoder)
    lines = [official(encoder, conversation) for conversation in generated_conversations(args.generation)]
    args.target.write_text("\n".join(lines) + "\n", encoding="ascii")
    print(f"{len(lines)} conversations, {lines.count('-')} of which the encoder can't render")


if __name__ == "__main__":
    main()

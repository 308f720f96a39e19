"""Small checkpoints in the official format for tests of everything that reads one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.make_checkpoint import write_checkpoint
from tools.synthetic_config import TINY, CheckpointSpec

SMALL: dict[str, Any] = TINY | {
    "compress_ratios": [0, 4, 128, 0],
    "head_dim": 64,
    "hidden_size": 64,
    "index_head_dim": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 0,
    "o_groups": 2,
    "o_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "vocab_size": 64,
}
"""One layer of each kind; about 0.5 MB."""


def write_small(
    folder: Path,
    *,
    seed: int = 0,
    single_file: bool = False,
    fp8_experts: bool = False,
    mtp: bool = False,
    **config: Any,
) -> Path:
    """Writes a checkpoint of SMALL's make and returns its folder."""
    values = SMALL | ({"num_nextn_predict_layers": 1} if mtp else {}) | config
    spec = CheckpointSpec(values, seed=seed, fp8_experts=fp8_experts, mtp=mtp)
    write_checkpoint(folder, spec, single_file=single_file)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes a key."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

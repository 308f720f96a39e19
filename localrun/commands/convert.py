"""`localrun convert SRC DST`: an official checkpoint becomes a directory that localrun and llama.cpp run.

Only handles output for people (stderr) and programs (`--json`, stdout); the work is done in `localrun.api.conversion`.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from localrun.api.conversion import run as run_conversion
from localrun.api.precision import Request
from localrun.commands import common
from localrun.commands.convert_output import ConvertOutput
from localrun.errors import LocalrunError
from localrun.options import DENSE_CHOICES

BASE_CHOICES = (
    *("mxfp4", "q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "q3_k", "iq3_s", "iq3_xxs"),
    *("q2_k", "iq2_s", "iq2_xs", "iq2_xxs", "bf16", "f32"),
)
"""Repeated from `quant.plan`, so that `--help` need not load it; a test compares them."""

EXAMPLES = """\
examples:
  localrun convert ~/downloads/DeepSeek-V4-Flash ~/models/v4-flash
  localrun convert ~/downloads/DeepSeek-V4-Flash ~/models/v4-flash --dense bf16 --dry-run
  localrun convert ~/downloads/DeepSeek-V4-Flash ~/models/v4-beside --keep-experts --dense q4_k
  localrun convert ~/downloads/DeepSeek-V4-Flash ~/models/v4-small --base q2_k --hot mxfp4:12GiB
  localrun convert ~/downloads/DeepSeek-V4-Flash ~/models/v4-small --hot mxfp4:20GiB     (another overlay, same base)
  localrun convert ~/downloads/DeepSeek-V4-Pro ~/models/v4-pro --target 24GiB-vram,128GiB-ram
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun convert`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "source", metavar="SRC", type=Path, help="an official checkpoint: a directory, or a name from [models]"
    )
    parser.add_argument(
        "target_folder",
        metavar="DST",
        type=Path,
        help="directory to write; rerun the same command to resume an interrupted conversion",
    )
    parser.add_argument(
        "--dense",
        choices=DENSE_CHOICES,
        default=None,
        metavar="TYPE",
        help="type for FP8 attention and shared-expert matrices: q8_0 (default); smaller: q6_k, q5_k, q4_k, with the output head, "
        "embeddings and compressors in q8_0 instead of BF16; exact: bf16, f32",
    )
    parser.add_argument(
        "--base",
        choices=BASE_CHOICES,
        default=None,
        metavar="TYPE",
        help="type for the experts: mxfp4 (default for FP4 checkpoints, exact), q8_0 (default for FP8); smaller:"
        " q4_k, iq4_xs, q3_k, iq3_s, iq3_xxs, q2_k, iq2_s, iq2_xs, iq2_xxs; larger: q5_k, q6_k, bf16, f32",
    )
    parser.add_argument(
        "--keep-experts",
        action="store_true",
        help="write only the dense part, a small directory made in minutes; experts are read from SRC, which must stay"
        " in place (after moving SRC, run the same command with its new path)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=None,
        metavar="N",
        help="threads for reading, converting and writing (8, or one per core)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the source and print sizes and the plan; write nothing"
    )
    parser.add_argument(
        "--split",
        type=common.size,
        metavar="SIZE",
        help="split into files of at most this size, e.g. 4GB for FAT32 (llama.cpp reads them too)",
    )
    parser.add_argument("--json", action="store_true", help="print progress and result as JSON, one object per line")
    _add_precision_arguments(parser)


def _add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    """Options about formats and what decides them."""
    precision = parser.add_argument_group("precision: other copies of chosen experts, in an overlay beside the base")
    precision.add_argument(
        "--hot",
        action="append",
        default=[],
        metavar="TYPE:SIZE",
        help="add up to this many bytes of better copies in this type, e.g. mxfp4:12GiB; repeatable; none removes the overlay",
    )
    precision.add_argument(
        "--cold",
        action="append",
        default=[],
        metavar="TYPE:SIZE",
        help="add this many bytes of smaller copies of the experts that matter least, e.g. q2_k:20GiB; they are used in place of"
        " the base's; repeatable",
    )
    precision.add_argument(
        "--target",
        metavar="SIZE-vram,SIZE-ram",
        help="choose base and copies for a machine with this much memory, e.g. 24GiB-vram,64GiB-ram",
    )
    precision.add_argument(
        "--recipe", metavar="NAME|FILE", help="take base, hot, target and dense from a recipe, e.g. ram-64"
    )
    learn = parser.add_argument_group("calibration (default: on a built-in text, for types that round)")
    learn.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="calibrate on this text instead (UTF-8, or JSONL of conversations)",
    )
    learn.add_argument("--calibrate-tokens", type=int, default=0, metavar="N", help="use only its first N tokens")
    learn.add_argument(
        "--imatrix", type=Path, metavar="FILE", help="take importance from a llama.cpp imatrix file instead"
    )
    learn.add_argument("--no-calibrate", action="store_true", help="quantize without importance data")
    learn.add_argument(
        "--ram",
        type=common.size,
        metavar="SIZE",
        help="RAM for experts during calibration (default: what is free); the conversion itself needs about 1 GiB",
    )
    parser.add_argument(
        "--evaluate",
        type=Path,
        metavar="FILE",
        help="afterwards, compare with the source on this held-out text (runs both); results go into the report",
    )
    parser.add_argument(
        "--evaluate-types",
        metavar="TYPE,...",
        help="with --evaluate: also compare models with all experts in these types, converted temporarily",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    out = ConvertOutput(as_json=args.json)
    names = (field.name for field in fields(Request))
    try:
        run_conversion(Request(**{name: getattr(args, name) for name in names}), out)
    except KeyboardInterrupt:
        out.note("interrupted; run the same command again to resume")
        out.event("interrupted", {})
        raise
    except LocalrunError as error:
        out.failed(error)
        raise
    except OSError as error:
        out.failed(LocalrunError(f"{error.filename or args.target_folder}: {error.strerror or error}"))
        raise
    return 0

"""V4-Flash on machines that people have, in one table of predictions: `python examples/plan_boxes.py [flash|pro]`."""

import sys

import localrun

BOXES = ("ram-32", "ram-128", "gpu-12-ram-32", "gpu-16-ram-64", "gpu-24-ram-64", "gpu-24-ram-128")

print(f"{'box':<16}{'experts':>8}{'in memory':>11}  tokens/s")
for box in BOXES:
    for base in ("mxfp4", "q2_k"):
        try:
            plan = localrun.plan(sys.argv[1] if len(sys.argv) > 1 else "flash", machine=box, base=base)
        except localrun.LocalrunError as error:
            print(f"{box:<16}{base:>8}  {error}")
            continue
        assert plan.decode is not None  # only models too small to matter have no prediction
        low, high = plan.decode.low.tokens_per_s, plan.decode.high.tokens_per_s
        print(f"{box:<16}{base:>8}{plan.resident_share:>11.0%}  {low:.1f} to {high:.1f}")

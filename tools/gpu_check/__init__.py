"""Measurements on a machine with one graphics card, in one command and eight minutes; `table` makes docs/gpu.md's table of them.

`models` makes whole models without their experts' bytes, `campaign` runs tasks in order of importance, each in a process of its own
(`task`), `pack` packs what a bare machine needs, `table` prints.
"""

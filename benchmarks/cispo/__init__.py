"""CISPO, DAPO, GRPO and controls on the same task, from the same weights, each at its best rate.

Read `arms`, `lockstep`, `run`, `measure`, `sweep`, `report`. `python -m benchmarks.cispo` runs it.
"""

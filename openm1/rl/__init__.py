"""Reinforcement learning with CISPO.

Reading order: losses, advantage, batch, stages, config, tasks, queue, collect, update, critic,
monitor, length_bias, loop (one page), local (wiring to the engine), record and report (a run to
read).
"""

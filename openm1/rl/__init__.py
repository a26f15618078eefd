"""Reinforcement learning with CISPO.

Reading order: losses, advantage, batch, stages, config, collect, update, monitor, loop (one page),
local (wiring to the engine).
"""

"""Reinforcement learning with CISPO.

Reading order: losses, advantage, batch, stages, config, collect, update, monitor, length_bias,
loop (one page), local (wiring to the engine).
"""

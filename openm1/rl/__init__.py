"""Reinforcement learning with CISPO.

Reading order: losses, advantage, batch, update, monitor, loop (one page), local (wiring to the
engine).
"""

"""What it costs to think: FLOPs, memory, time and money, counted from a config. Nothing is built.

Reading order: shape, attention, models, flops, figure, memory, fleet, devices, roofline, cost,
tables, plots.
"""

"""The command line.

Reading order: main (which command), commands (what each does), chat (the conversation on a terminal).
"""

"""The command line.

Reading order: main (which command), commands (what each does), chat (a conversation on a terminal).
"""

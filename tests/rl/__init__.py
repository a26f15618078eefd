"""Tests of openm1.rl; play.py holds the tasks and policies they share."""

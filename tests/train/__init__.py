"""Tests of openm1.train; tiny.py makes the models and examples they share."""

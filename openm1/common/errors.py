"""The one error that a person who runs a training should see as a sentence."""

from __future__ import annotations


class RunStopped(RuntimeError):
    """A run that cannot go on. Its newest checkpoint is whole: the same command resumes there."""

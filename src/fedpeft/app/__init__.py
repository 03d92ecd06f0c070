"""The composition root: builds a federation from a configuration, runs it, and uses what came out."""

from fedpeft.app.checking import check
from fedpeft.app.running import Run, resume, run
from fedpeft.app.studies import Comparison, compare, demo
from fedpeft.app.using import evaluate, export, predict

__all__ = ["Comparison", "Run", "check", "compare", "demo", "evaluate", "export", "predict", "resume", "run"]

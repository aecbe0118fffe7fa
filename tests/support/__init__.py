"""What several tests share: worlds of ranks, tiny models, runs, engines, faults."""

from pathlib import Path

ROOT = Path(__file__).parents[2]

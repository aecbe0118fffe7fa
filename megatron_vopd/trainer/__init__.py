"""The training step: collect, pack, score, loss, guard, metrics, evaluation."""

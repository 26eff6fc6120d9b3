"""Reports on a run: progress, evaluation, and the HTML report."""

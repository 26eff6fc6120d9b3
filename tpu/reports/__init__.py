"""What a run reports: progress, evaluation, and the HTML report."""

"""Studies to scores, scores to figures with intervals, tables and plots."""

"""From studies to scores, and from scores to figures with intervals, tables and plots."""

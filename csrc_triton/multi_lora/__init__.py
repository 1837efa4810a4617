"""Linear layer whose samples each use their own low-rank adapter of one shared, frozen weight."""

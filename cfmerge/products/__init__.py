"""The public calls: merge, plan, sweep, accumulate and solve, and the same for trees in memory."""

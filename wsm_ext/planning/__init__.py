"""From budgets, settings and measurements to a plan: what it takes, and what it predicts."""

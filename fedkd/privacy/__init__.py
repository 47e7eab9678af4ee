"""Budgets: what private training costs, who may spend how much, what must not leak beside it."""

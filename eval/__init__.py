"""Evaluation: decision logic, statistics and the report page. Nothing here imports an algorithm."""

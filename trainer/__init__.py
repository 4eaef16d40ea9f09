"""Shards to models: data, losses, the student-teacher pair, distillation, evaluation, export."""

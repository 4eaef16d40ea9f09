"""How the algorithms become stages: plan, schedule, resume, commit, verify; and the recipes that ship."""

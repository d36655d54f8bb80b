"""What networks have learnt: figures, tables, pictures."""

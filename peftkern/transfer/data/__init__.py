"""What is wrong in the data: wrong labels, near duplicates, training text that the evaluation holds too, rows
that are never learnt."""

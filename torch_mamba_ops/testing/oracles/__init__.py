"""Sequential recurrences written from the equations, in the dtype of what they are given: the truth in float64."""

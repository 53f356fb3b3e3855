"""vantage6, generations 3, 4 and 5: client, models, encryption."""

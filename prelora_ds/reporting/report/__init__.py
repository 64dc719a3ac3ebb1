"""`prelora report --out`: a folder with page, figures, tables and the data behind them, made from the logs of runs."""

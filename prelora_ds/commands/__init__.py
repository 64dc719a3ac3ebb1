"""The commands of `prelora`; the only files that know typer."""

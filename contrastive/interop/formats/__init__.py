"""Foreign formats, one package each: `reading` and `writing`."""

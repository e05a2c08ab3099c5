"""`contrastive demo`, as a file that launchers start."""

from contrastive.entry import run

if __name__ == "__main__":
    run("demo")

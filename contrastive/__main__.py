"""`python -m contrastive NAME ...`; also as launchers start it, `accelerate launch -m contrastive pretrain`."""

from contrastive.entry import main

if __name__ == "__main__":  # loader workers that are spawned import this file too
    main()

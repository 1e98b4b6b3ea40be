"""Supervised fine-tuning as a script, for clusters that run scripts:

    ray job submit --working-dir . -- python jobs/sft.py examples/sft.yaml train.max_steps=10

The same as `rayswift train JOB.yaml KEY=VALUE...`, except that a job of another method is refused.
"""

from rayswift.cli import script

if __name__ == "__main__":
    script("train", "--method=sft")
